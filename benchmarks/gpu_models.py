"""A model over three tiers at shares of its experts in VRAM: speed by share, and whether the tokens stay the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

import offload
from benchmarks.checkpoints import Shape, ensure_checkpoint, random_tokens, store_root, vocabulary
from benchmarks.harness import Report, Row, say
from offload.preparation import prepare_checkpoint
from offload.request import make_request

if TYPE_CHECKING:
    from offload.runtime import Runtime

MODELS = {
    "Mixtral-like": Shape(8, 4096, 8, 14336, 2, 32, 8, 128, 32000),
    "Qwen3-30B-A3B-like": Shape(24, 2048, 128, 768, 8, 32, 4, 128, 32000),
    "DeepSeek-V2-Lite-like": Shape(26, 2048, 64, 1408, 6, 16, 16, 128, 32000),
}
"""The experts' sizes are those of the models; layers and vocabulary are cut where disk and time ask for it."""

SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class ModelScale:
    """How much is measured.

    Attributes:
        shapes: models by name, with random weights.
        shares: of the experts that have slots in VRAM, the largest first.
        prompt_tokens: of one prompt.
        new_tokens: decoded greedily.
        ram: budget in host memory.
    """

    shapes: dict[str, Shape]
    shares: tuple[float, ...]
    prompt_tokens: int
    new_tokens: int
    ram: str


FULL = ModelScale(MODELS, SHARES, 512, 64, "96GiB")
TINY = Shape(2, 64, 4, 48, 2, 4, 2, 16, 199)
QUICK = ModelScale({"tiny": TINY}, (1.0, 0.5), 24, 4, "1GiB")


def model_table(report: Report, scale: ModelScale, device: str, work: Path) -> list[Row]:
    """Rows of every model and share.

    Args:
        report: takes gates, and on a GPU targets: there roundings depend on where an expert was computed.
        scale: how much.
        device: "cuda:N", or "host" for an accelerator that host memory plays, whose speed means nothing.
        work: directory for checkpoints and stores.
    """
    rows = []
    for name, shape in scale.shapes.items():
        checkpoint = ensure_checkpoint(shape, work)
        first: list[int] = []
        for share in scale.shares:
            say(f"{name}, {share:.0%} of the experts in VRAM")
            vram = _vram_for(checkpoint, scale, share, device, work)
            for graph in (False, True):
                tokens, row = _measure(checkpoint, scale, vram, device, work, step_graph=graph)
                first = first or tokens
                same = sum(a == b for a, b in zip(tokens, first, strict=True)) / len(first)
                label = f"{name}, {share:.0%}{', graphs' if graph else ''}"
                if device == "host" and not graph:
                    report.gate(label, same == 1.0, "tokens as with all experts in VRAM")
                else:
                    report.target(f"{label}: tokens as with all in VRAM", same, "at least", 1.0)
                rows.append({"model": name, "experts_in_vram": share, "graphs": graph, **row, "same_tokens": same})
    return rows


def _options(scale: ModelScale, device: str, work: Path) -> dict[str, Any]:
    context = scale.prompt_tokens + scale.new_tokens
    return {"ram": scale.ram, "nvme": store_root(work), "context": context, "device": device}


def _vram_for(checkpoint: Path, scale: ModelScale, share: float, device: str, work: Path) -> int:
    vram = str(1 << 40) if device == "host" else None
    request = make_request(
        **_options(scale, device, work), vram=vram, batch=1, prefill_chunk=1024, max_memory=None
    )  # fmt: skip
    prepared = prepare_checkpoint(checkpoint, request)
    prepared.close()
    plan = prepared.plan
    assert plan.vram is not None
    use = plan.vram.use
    slots = max(2, round(share * plan.expert_count))
    return use.total_nbytes - use.slot_nbytes + slots * plan.slot_nbytes


def _measure(
    checkpoint: Path, scale: ModelScale, vram: int, device: str, work: Path, *, step_graph: bool
) -> tuple[list[int], Row]:
    ids = torch.tensor([random_tokens(scale.prompt_tokens, vocabulary(checkpoint), seed=1)])
    model = offload.load(
        checkpoint, **_options(scale, device, work), vram=vram, step_graph=step_graph, progress=False
    )  # fmt: skip
    runtime = cast("Runtime", model.offload)
    with runtime:
        ids = ids.to(model.device)
        # Kernels are compiled and the caches warm before what counts.
        _greedy(model, ids, 2)
        runtime.reset_stats()
        out = _greedy(model, ids, scale.new_tokens)
        stats = runtime.stats()
    upper = stats.accelerator
    assert upper is not None
    return out[0, ids.shape[1] :].tolist(), {
        "decode_tokens_per_s": stats.decode_tokens_per_s,
        "prefill_tokens_per_s": stats.prefill_tokens_per_s,
        "vram_hit_rate": upper.hits / max(1, upper.hits + upper.misses),
        "GB_copied": upper.bytes_copied / 1e9,
        "steps_replayed": 0 if stats.graphs is None else stats.graphs.replayed,
    }


def _greedy(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    out = model.generate(  # type: ignore[operator]
        ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
    )
    assert isinstance(out, torch.Tensor)
    return out
