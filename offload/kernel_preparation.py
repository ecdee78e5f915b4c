"""Compiling what a model's kernels need, or loading it from Numba's cache, before the first token waits for it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from cpu_kernels.linear import MOST_TOKENS
from offload.devices.host_experts import compile_for
from offload.hf.fused.attention import prepare_attention
from offload.hf.fused.decoder import write_tape
from offload.hf.fused.swap import plain_class
from offload.hf.quantised_linear import QuantisedLinear
from offload.moe.layer import ExpertsLayer
from offload.store.progress import Progress


def prepare_kernels(
    model: PreTrainedModel, layers: Iterable[ExpertsLayer], progress: Progress, *, attends: bool = False
) -> None:
    """Have everything at hand that decoding and prompts of this model run.

    Args:
        model: with its kernels in place.
        layers: of its experts.
        progress: told once; compiling takes seconds for each format the first time, loading tenths.
        attends: whether kernels attend to prompts.
    """
    progress.start(0, "Preparing kernels: compiled the first time, then kept")
    try:
        for layer in {(layer.layout, layer.dtype): layer for layer in layers}.values():
            compile_for(layer)
        with torch.no_grad():
            for linear in _smallest_of_each_kind(model):
                for tokens in (1, MOST_TOKENS + 1):
                    linear(torch.zeros(tokens, linear.in_features, dtype=model.dtype, device="cpu"))
            if attends:
                prepare_attention(model)
        write_tape(model)
    finally:
        progress.finish()


def _smallest_of_each_kind(model: PreTrainedModel) -> list[nn.Linear | QuantisedLinear]:
    found: dict[object, nn.Linear | QuantisedLinear] = {}
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            kind: object = module.layout.format
        elif isinstance(module, nn.Linear) and _is_plain(module, model.dtype):
            kind = type(module)
        else:
            continue
        known = found.get(kind)
        if known is None or _size(module) < _size(known):
            found[kind] = module
    return list(found.values())


def _is_plain(module: nn.Linear, dtype: torch.dtype) -> bool:
    return plain_class(module) is nn.Linear and module.weight.is_cpu and module.weight.dtype is dtype


def _size(module: nn.Linear | QuantisedLinear) -> int:
    return module.in_features * module.out_features
