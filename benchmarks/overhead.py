"""What a decode step costs beyond reading weights: small operations, calls and Python, with and without kernels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import offload
from benchmarks import checkpoints
from benchmarks.equality import gate_close, relative_rms
from benchmarks.harness import Report, Spread, interleave, say
from benchmarks.machine import read_bandwidth
from cpu_kernels.tape import Tape
from offload.devices.host_threads import kernel_pool
from offload.request import FUSED_KINDS

LAYER_OF_30B = checkpoints.Shape(
    layers=4, hidden=2048, experts=128, expert_intermediate=32, top_k=8, heads=32, kv_heads=4, head_dim=128, vocab=1024
)
"""Layers of Qwen3-30B-A3B but for the experts, which are so narrow that computing them takes next to no time."""

LOGITS_TOLERANCE = 0.05
"""Root mean square of the difference of bf16 logits, relative to theirs."""

TARGET_US = 100.0

_CONTEXTS = (16, 1024)


@dataclass(frozen=True)
class OverheadScale:
    """Rounds of so many decode steps for each variant."""

    rounds: int
    steps: int


FULL = OverheadScale(rounds=15, steps=8)
QUICK = OverheadScale(rounds=2, steps=2)


def run(work: Path, shape: checkpoints.Shape, scale: OverheadScale) -> Report:
    """The benchmark, on a few layers with next to nothing in their experts."""
    report = Report("overhead")
    checkpoint = checkpoints.ensure_checkpoint(shape, work)
    ram = checkpoints.budget_for(checkpoint, 1.0, max(_CONTEXTS) + 256)
    variants: dict[str, Iterable[str] | bool] = {"none": False, "all": True}
    variants |= {f"all but {kind}": [other for other in FUSED_KINDS if other != kind] for kind in FUSED_KINDS}
    models: dict[str, PreTrainedModel] = {}
    for name, fused in variants.items():
        say(f"loading with fused: {name}")
        models[name] = offload.load(
            checkpoint, ram=ram, nvme=checkpoints.store_root(work), context=max(_CONTEXTS) + 256, fused=fused,
            progress=False,
        )  # fmt: skip
    with torch.no_grad():
        _gate(report, models, shape)
        _whole_passes(report, models, shape, scale)
        _beyond_weights(report, models, shape, scale)
    for model in models.values():
        _runtime(model).close()
    report.notes.append(
        f"{shape.layers} layers of hidden {shape.hidden}, {shape.heads}/{shape.kv_heads} heads of {shape.head_dim}, "
        f"{shape.experts} experts top-{shape.top_k}; random weights and tokens; batch 1. Microseconds of a whole pass "
        "divided by its layers, so that embedding, mask, head and hooks of the pass are in it."
    )
    return report


def _runtime(model: PreTrainedModel) -> Any:
    return model.offload


def _gate(report: Report, models: dict[str, PreTrainedModel], shape: checkpoints.Shape) -> None:
    expected = _logits(models["none"], shape)
    for name, model in models.items():
        gate_close(report, f"logits, fused: {name}", _logits(model, shape), expected, relative_rms, LOGITS_TOLERANCE)


def _logits(model: PreTrainedModel, shape: checkpoints.Shape) -> Any:
    """Of a token after a short prompt, so that decoding takes part."""
    ids = torch.tensor([checkpoints.random_tokens(33, shape.vocab, 1)])
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    return model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits.float().numpy()


def _whole_passes(
    report: Report, models: dict[str, PreTrainedModel], shape: checkpoints.Shape, scale: OverheadScale
) -> None:
    """Everything but the experts, projections and attention included."""
    bandwidth = read_bandwidth()
    nbytes = sum(module.weight.nbytes for module in models["none"].modules() if isinstance(module, torch.nn.Linear))
    for context in _CONTEXTS:
        turns = {
            name: partial(_per_layer_us, model, _cache(model, context, shape), shape.layers, scale.steps)
            for name, model in models.items()
        }
        interleave(turns, 1)
        for name, us in interleave(turns, scale.rounds).items():
            report.tables.setdefault("A layer without experts, microseconds", []).append(
                {
                    "context": context,
                    "fused": name,
                    "pass": Spread.of(us),
                    "linear weights at read bandwidth": 1e6 * nbytes / bandwidth / shape.layers,
                }
            )


def _beyond_weights(
    report: Report, models: dict[str, PreTrainedModel], shape: checkpoints.Shape, scale: OverheadScale
) -> None:
    """Next to nothing to attend to, and linear layers subtracted."""
    context = _CONTEXTS[0]
    turns = {}
    for name, model in models.items():
        cache = _cache(model, context, shape)
        turns[name] = partial(_beyond_us, model, cache, _linears(model), shape.layers, scale.steps)
    interleave(turns, 1)
    for name, us in interleave(turns, scale.rounds).items():
        spread = Spread.of(us)
        report.tables.setdefault("A layer beyond weights and attention, microseconds", []).append(
            {"fused": name, "overhead": spread}
        )
        if name == "all":
            report.target("overhead of a layer in microseconds, all fused", spread.median, "at most", TARGET_US)


def _cache(model: PreTrainedModel, context: int, shape: checkpoints.Shape) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([checkpoints.random_tokens(context, shape.vocab, 0)])
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _per_layer_us(model: PreTrainedModel, cache: DynamicCache, layers: int, steps: int) -> float:
    ids = torch.tensor([[7]])
    before = perf_counter()
    for _ in range(steps):
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    us = 1e6 * (perf_counter() - before) / steps / layers
    cache.crop(-steps)
    return us


def _beyond_us(model: PreTrainedModel, cache: DynamicCache, tape: Tape, layers: int, steps: int) -> float:
    """A pass less its linear layers' kernels, run one after the other on the same weights just before."""
    pool = kernel_pool()
    before = perf_counter()
    for _ in range(steps):
        tape.play(pool)
    alone = 1e6 * (perf_counter() - before) / steps / layers
    return _per_layer_us(model, cache, layers, steps) - alone


def _linears(model: PreTrainedModel) -> Tape:
    """The linear layers' kernels for one token."""
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    tape = Tape(modules[0].weight.dtype)
    x = tape.scratch(max(module.in_features for module in modules)).zero_()
    out = tape.scratch(max(module.out_features for module in modules))
    for module in modules:
        tape.linear(x.data_ptr(), module.weight, module.bias, 1, out.data_ptr())
    return tape
