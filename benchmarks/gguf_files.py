"""Checkpoints of the benchmarks as GGUF files for llama.cpp: the same weights, which its own program then packs.

llama.cpp's converter wants a tokenizer; a random checkpoint has none, and needs none to be timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize
from safetensors import safe_open
from transformers import AutoConfig

from benchmarks import checkpoints

_Q4_0_BLOCK, _Q4_0_NBYTES = 32, 18

_LAYER = "model.layers.{}."
_DENSE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def ensure_gguf(checkpoint: Path, work: Path) -> Path:
    """The bf16 GGUF of a Qwen3-MoE checkpoint; written unless it is there."""
    return _written_once(work, f"{checkpoint.name}-bf16.gguf", partial(_write, checkpoint))


def _written_once(work: Path, name: str, write: Callable[[Path], None]) -> Path:
    path = work / "gguf" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        write(unfinished)
        unfinished.rename(path)
    return path


def differing_tensors(checkpoint: Path, path: Path) -> list[str]:
    """Names of tensors of a GGUF whose values are not the checkpoint's, of the first layer and outside of layers."""
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    source = _Source(checkpoint)
    names = [(theirs, name) for name, theirs in _OUTER.items()]
    names += [(f"blk.0.{theirs}", _LAYER.format(0) + name) for name, theirs in _DENSE.items()]
    pairs = [(theirs, source.stored(f"{name}.weight")) for theirs, name in names if source.has(f"{name}.weight")]
    pairs += [(f"blk.0.{theirs}.weight", source.experts(0, name)) for name, theirs in _EXPERTS.items()]
    return [
        name
        for name, expected in pairs
        if not np.array_equal(
            tensors[name if name.endswith(".weight") else f"{name}.weight"].view(np.uint8).reshape(-1),
            expected.view(np.uint8).reshape(-1),
        )
    ]


def ensure_random_gguf(config: Any, work: Path, name: str) -> Path:
    """A q4_0 GGUF of a Qwen3-MoE config with random weights, whose routers are fp32; written unless it is there.

    Matrices are turns of one of gaussian weights, so that a model larger than memory is written at the disk's pace.
    """
    return _written_once(work, f"{name}-random-q4_0.gguf", partial(_write_random, config))


def _write_random(config: Any, path: Path) -> None:
    writer = _writer(config, path)
    shapes = _shapes(config)
    for name, shape in shapes.items():
        if _is_packed(name, shape):
            row_nbytes = shape[-1] // _Q4_0_BLOCK * _Q4_0_NBYTES
            kind, nbytes = GGMLQuantizationType.Q4_0, row_nbytes * int(np.prod(shape[:-1]))
            stored: tuple[int, ...] = (*shape[:-1], row_nbytes)
        else:
            kind, nbytes = GGMLQuantizationType.F32, 4 * int(np.prod(shape))
            stored = (*shape[:-1], 4 * shape[-1])
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    blocks = quantize(0.02 * generator.standard_normal((1 << 16, 256), np.float32), GGMLQuantizationType.Q4_0)
    blocks = blocks.reshape(-1, _Q4_0_NBYTES)
    for turn, (name, shape) in enumerate(shapes.items()):
        if _is_packed(name, shape):
            count = int(np.prod(shape)) // _Q4_0_BLOCK
            turned = np.roll(blocks, turn, axis=0)
            writer.write_tensor_data(np.resize(turned, (count, _Q4_0_NBYTES)))
        elif len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, np.float32))
        else:
            writer.write_tensor_data(0.02 * generator.standard_normal(shape, np.float32))
    writer.close()


def _is_packed(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and "ffn_gate_inp" not in name


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor's name in llama.cpp and its shape, the input's width last."""
    hidden, experts, width = config.hidden_size, config.num_experts, config.moe_intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    of_layer = {
        "input_layernorm": (hidden,), "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q), "self_attn.q_norm": (config.head_dim,),
        "self_attn.k_norm": (config.head_dim,), "post_attention_layernorm": (hidden,), "mlp.gate": (experts, hidden),
        "gate_proj": (experts, width, hidden), "up_proj": (experts, width, hidden),
        "down_proj": (experts, hidden, width),
    }  # fmt: skip
    theirs = _DENSE | _EXPERTS
    outer = {"token_embd": (config.vocab_size, hidden), "output_norm": (hidden,), "output": (config.vocab_size, hidden)}
    return {f"{name}.weight": shape for name, shape in outer.items()} | {
        f"blk.{layer}.{theirs[name]}.weight": shape
        for layer in range(config.num_hidden_layers)
        for name, shape in of_layer.items()
    }


def _write(checkpoint: Path, path: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    writer = _writer(config, path)
    source = _Source(checkpoint)
    # Infos first, then the weights one after the other: the file is as large as memory may be.
    todo: list[tuple[str, int, str]] = []
    for name, theirs in _OUTER.items():
        if source.has(f"{name}.weight"):
            todo.append((f"{theirs}.weight", -1, f"{name}.weight"))
    for layer in range(config.num_hidden_layers):
        todo += [
            (f"blk.{layer}.{theirs}.weight", -1, f"{_LAYER.format(layer)}{name}.weight")
            for name, theirs in _DENSE.items()
        ]
        todo += [(f"blk.{layer}.{theirs}.weight", layer, name) for name, theirs in _EXPERTS.items()]
    for name, layer, key in todo:
        weights = source.stored(key) if layer < 0 else source.experts(layer, key)
        kind = GGMLQuantizationType.BF16 if weights.dtype == np.uint16 else GGMLQuantizationType.F32
        shape = (*weights.shape[:-1], weights.shape[-1] * weights.itemsize)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), weights.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _name, layer, key in todo:
        writer.write_tensor_data(source.stored(key) if layer < 0 else source.experts(layer, key))
    writer.close()


def _writer(config: Any, path: Path) -> GGUFWriter:
    """A file of a Qwen3-MoE model to which tensors are to be added."""
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    return writer


class _Source:
    """A checkpoint's weights as llama.cpp keeps them: vectors and routers in fp32, matrices as bf16's bits."""

    def __init__(self, checkpoint: Path) -> None:
        self._files = {}
        for file in checkpoints.weight_files(checkpoint):
            opened = safe_open(file, framework="pt")
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def has(self, name: str) -> bool:
        return name in self._files

    def stored(self, name: str) -> npt.NDArray[np.generic]:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        if tensor.dim() == 1 or name.endswith("mlp.gate.weight"):
            return tensor.float().numpy()
        return tensor.view(torch.int16).numpy().view(np.uint16)

    def experts(self, layer: int, projection: str) -> npt.NDArray[np.generic]:
        prefix = f"{_LAYER.format(layer)}mlp.experts."
        count = sum(1 for name in self._files if name.startswith(prefix) and name.endswith(f".{projection}.weight"))
        return np.stack([self.stored(f"{prefix}{expert}.{projection}.weight") for expert in range(count)])
