"""Compiling what a model's kernels need, or loading it from Numba's cache, before the first token waits for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from cpu_kernels.compiling.together import compile_together
from cpu_kernels.linear import MOST_TOKENS
from cpu_kernels.prompt_attention import compile_prompt_attention
from cpu_kernels.threads import default_threads
from offload.devices.host_experts import compile_for
from offload.hf.fused.attention import prompts_are_attended
from offload.hf.fused.decoder import write_tape
from offload.hf.fused.swap import plain_class
from offload.hf.quantised_linear import QuantisedLinear
from offload.kernel_list import kernels_of_model
from offload.moe.layer import ExpertsLayer
from offload.store.progress import Progress

_PROCESS_NBYTES = 1 << 30
"""More than a process takes that compiles."""


def compile_ahead(
    model: PreTrainedModel,
    layers: Iterable[ExpertsLayer],
    progress: Progress,
    *,
    fused: Collection[str],
    with_policy: bool,
    spare_ram_nbytes: int,
) -> None:
    """Compile what can be named before kernels are in place, or load it; with another process where memory allows.

    Args:
        model: with its weights.
        layers: of its experts.
        progress: told once; compiling takes a minute the first time, loading a second.
        fused: kinds of modules that kernels will compute.
        with_policy: whether experts come and go, by the default policy.
        spare_ram_nbytes: of memory that nothing else is to take.
    """
    formats = {layer.layout.format for layer in layers}
    formats |= {module.layout.format for module in model.modules() if isinstance(module, QuantisedLinear)}
    kernels = kernels_of_model(
        model.dtype, formats, with_policy=with_policy, decodes="decoder" in fused,
        attends="attention" in fused and prompts_are_attended(model),
    )  # fmt: skip
    progress.start(0, "Preparing kernels: compiled the first time, then kept")
    try:
        compile_together(kernels, processes=2 if spare_ram_nbytes >= _PROCESS_NBYTES and default_threads() > 1 else 1)
    finally:
        progress.finish()


def prepare_kernels(model: PreTrainedModel, layers: Iterable[ExpertsLayer], *, attends: bool = False) -> None:
    """Have everything at hand that decoding and prompts of this model run, by running small ones.

    Args:
        model: with its kernels in place.
        layers: of its experts.
        attends: whether kernels attend to prompts.
    """
    for layer in {(layer.layout, layer.dtype): layer for layer in layers}.values():
        compile_for(layer)
    with torch.no_grad():
        for linear in _smallest_of_each_kind(model):
            for tokens in (1, MOST_TOKENS + 1):
                linear(torch.zeros(tokens, linear.in_features, dtype=model.dtype, device="cpu"))
        if attends and prompts_are_attended(model):
            compile_prompt_attention(model.dtype)
    write_tape(model)


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
