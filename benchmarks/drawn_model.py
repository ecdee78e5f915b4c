"""A model that is drawn by chance: routing with published statistics, at the shape of a published model.

It is synthetic and says nothing. What it is for is a deep model's routing, in real reads and real computation: token t
of the vocabulary is the t-th step of a walk, so that the text 0, 1, 2, ... has the locality that it was given, and each
layer changes the hidden state a little, which decides how far routers of layers to come can be foreseen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.checkpoints import written_once
from benchmarks.trace_recording import MODEL

_GATED_RMS = 0.596
"""Of silu(g) u, with g and u normal with variance 1."""


@dataclass(frozen=True)
class DrawnModel:
    """A shape, and how it is drawn.

    Attributes:
        layers: all of them with experts.
        experts: of a layer.
        top_k: of a token.
        hidden: width.
        intermediate: width of an expert.
        heads: of attention, with keys and values of their own for one in 8 of them.
        head_dim: of each.
        tokens: of the vocabulary, and of the longest text.
        mean: share of a token's hidden state, as variance, that all tokens have: what makes experts popular.
        locality: correlation of the rest with that of the token before.
        attention: what a layer's attention adds to a hidden state of variance 1, as standard deviation, were its values
            of variance 1.
        change: what a layer's experts add to it.
    """

    layers: int = 10
    experts: int = 64
    top_k: int = 8
    hidden: int = 1024
    intermediate: int = 256
    heads: int = 16
    head_dim: int = 128
    tokens: int = 512
    mean: float = 0.35
    locality: float = 0.4
    attention: float = 0.1
    change: float = 0.2

    @property
    def name(self) -> str:
        """Says that it is synthetic, and its parameters."""
        return (
            f"drawn {self.layers}x{self.experts} top-{self.top_k}, {self.hidden}x{self.intermediate}, mean "
            f"{self.mean:g}, locality {self.locality:g}, attention {self.attention:g}, change {self.change:g}"
        )


def ensure_drawn(work: Path, model: DrawnModel) -> Path:
    """The bf16 checkpoint of a drawn model, under `work`; written unless it is there."""
    return written_once(work, model.name.replace(", ", "-").replace(" ", "-"), partial(_write, model))


def _write(model: DrawnModel, directory: Path) -> None:
    directory.mkdir(parents=True)
    config = json.loads((MODEL / "config.json").read_text())
    config |= {
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "moe_intermediate_size": model.intermediate,
        "head_dim": model.head_dim,
        "num_attention_heads": model.heads,
        "num_key_value_heads": max(1, model.heads // 8),
        "num_experts": model.experts,
        "num_local_experts": model.experts,
        "num_experts_per_tok": model.top_k,
        "num_hidden_layers": model.layers,
        "vocab_size": model.tokens,
    }
    (directory / "config.json").write_text(json.dumps(config))
    chance = torch.Generator().manual_seed(0)
    names: dict[str, str] = {}
    for part in range(model.layers + 1):
        file = f"model-{part:05d}.safetensors"
        weights = _dense(model, chance) if part == model.layers else _layer(model, part, chance)
        save_file(weights, directory / file, {"format": "pt"})
        names |= dict.fromkeys(weights, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _dense(model: DrawnModel, chance: torch.Generator) -> dict[str, torch.Tensor]:
    """The walk, and a last norm."""
    walk = torch.randn(model.tokens, model.hidden, generator=chance)
    for token in range(1, model.tokens):
        walk[token] = model.locality * walk[token - 1] + math.sqrt(1.0 - model.locality**2) * walk[token]
    shared = torch.randn(1, model.hidden, generator=chance)
    embeddings = math.sqrt(model.mean) * shared + math.sqrt(1.0 - model.mean) * walk
    return {
        "model.embed_tokens.weight": embeddings.to(torch.bfloat16),
        "model.norm.weight": torch.ones(model.hidden, dtype=torch.bfloat16),
    }


def _layer(model: DrawnModel, layer: int, chance: torch.Generator) -> dict[str, torch.Tensor]:
    hidden, wide, width = model.hidden, model.heads * model.head_dim, model.intermediate
    narrow = max(1, model.heads // 8) * model.head_dim

    def normal(rows: int, columns: int, deviation: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=chance).mul_(deviation).to(torch.bfloat16)

    def ones(count: int) -> torch.Tensor:
        return torch.ones(count, dtype=torch.bfloat16)

    unit = hidden**-0.5
    # The mean of top_k outputs is that much smaller than one.
    down = model.change * math.sqrt(model.top_k / width) / _GATED_RMS
    parts: dict[str, Callable[[], torch.Tensor]] = {
        "input_layernorm": lambda: ones(hidden),
        "post_attention_layernorm": lambda: ones(hidden),
        "self_attn.q_proj": lambda: normal(wide, hidden, unit),
        "self_attn.k_proj": lambda: normal(narrow, hidden, unit),
        "self_attn.v_proj": lambda: normal(narrow, hidden, unit),
        "self_attn.o_proj": lambda: normal(hidden, wide, model.attention * wide**-0.5),
        "self_attn.q_norm": lambda: ones(model.head_dim),
        "self_attn.k_norm": lambda: ones(model.head_dim),
        "mlp.gate": lambda: normal(model.experts, hidden, 1.5 * unit),
    }
    for expert in range(model.experts):
        parts |= {
            f"mlp.experts.{expert}.gate_proj": lambda: normal(width, hidden, unit),
            f"mlp.experts.{expert}.up_proj": lambda: normal(width, hidden, unit),
            f"mlp.experts.{expert}.down_proj": lambda: normal(hidden, width, down),
        }
    return {f"model.layers.{layer}.{name}.weight": draw() for name, draw in parts.items()}
