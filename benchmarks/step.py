"""What a MoE layer costs beyond its kernels: everything resident, the kernel call taken away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import offload
from benchmarks import checkpoints
from benchmarks.equality import gate_close, relative_rms
from benchmarks.harness import Report, Spread, interleave
from benchmarks.machine import read_bandwidth, require_memory
from offload.devices.base import Device, ExpertBatch, Slab
from offload.errors import UnsupportedOperationError
from offload.hf.dtypes import DTYPE_OF_FORMAT
from offload.moe.layer import ExpertsLayer
from offload.runtime import Runtime

BF16_TOLERANCE = 0.02
"""Of one layer against fp32 arithmetic on the same bf16 weights: two roundings to 8 bits."""

_CONTEXT_TOKENS = 1024


@dataclass(frozen=True)
class StepScale:
    """Passes over all layers, for each number of tokens."""

    rounds: int
    tokens: tuple[int, ...] = (1, 8)


FULL = StepScale(rounds=60)
QUICK = StepScale(rounds=10)


@dataclass(frozen=True)
class Inputs:
    """What one layer gets: hidden [T, H], index [T, k], weights [T, k]."""

    layer: ExpertsLayer
    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Call:
    """The arguments of one call of `Device.run_experts`."""

    layer: ExpertsLayer
    batch: ExpertBatch
    hidden: torch.Tensor
    out: torch.Tensor


class NullDevice(Device):
    """Computes nothing; keeps the calls that it gets while `recorded` is a list."""

    name = "null"

    def __init__(self) -> None:
        self.recorded: list[Call] | None = None

    def allocate(self, nbytes: int) -> Slab:
        """Refused: the slots belong to another device."""
        raise UnsupportedOperationError("the null device has no slots: allocate on the device that it stands for")

    def run_experts(self, layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Leaves `out` as it is."""
        if self.recorded is not None:
            self.recorded.append(Call(layer, batch, hidden, torch.empty_like(out)))

    def synchronise(self) -> None:
        """Nothing to wait for."""


def run(work: Path, shape: checkpoints.Shape, scale: StepScale) -> Report:
    """The benchmark, with a model whose experts are all resident."""
    report = Report("step")
    checkpoint = checkpoints.ensure_checkpoint(shape, work)
    ram = checkpoints.budget_for(checkpoint, 1.0, _CONTEXT_TOKENS)
    require_memory(ram, "a resident model")
    model = offload.load(
        checkpoint, ram=ram, nvme=checkpoints.store_root(work), context=_CONTEXT_TOKENS, progress=False
    )
    runtime: Any = model.offload
    with runtime, torch.no_grad():
        bandwidth = read_bandwidth()
        for tokens in scale.tokens:
            inputs = [_inputs(layer, tokens, shape.top_k, seed) for seed, layer in enumerate(runtime.layers)]
            _gate(report, runtime, inputs[0])
            _measure(report, runtime, inputs, bandwidth, scale.rounds)
    report.notes.append(
        "Each pass goes over all layers, so that no expert is in the caches of the CPU when its turn comes. The null "
        "device computes nothing; the kernel alone gets the arguments that the step gave it."
    )
    return report


def _inputs(layer: ExpertsLayer, tokens: int, top_k: int, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, layer.layout.hidden, generator=generator).to(layer.dtype)
    weights, index = torch.rand(tokens, layer.count, generator=generator).topk(top_k)
    return Inputs(layer, hidden, index, weights.softmax(-1).to(layer.dtype))


def _gate(report: Report, runtime: Runtime, inputs: Inputs) -> None:
    found = runtime.step(inputs.layer, inputs.hidden, inputs.index, inputs.weights).float().numpy()
    expected = torch.zeros(inputs.hidden.shape)
    for token in range(len(inputs.hidden)):
        for weight, expert in zip(inputs.weights[token], inputs.index[token], strict=True):
            expected[token] += weight.float() * _expert(runtime, inputs.layer, int(expert), inputs.hidden[token])
    gate_close(report, "a layer's output", found, expected.numpy(), relative_rms, BF16_TOLERANCE)


def _expert(runtime: Runtime, layer: ExpertsLayer, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """In fp32, from the store's file."""
    location = runtime.store.location(runtime.layers.index(layer), expert)
    bundle = np.fromfile(runtime.store.shard_paths[location.shard], np.uint8, location.nbytes, offset=location.offset)
    matrix: dict[str, torch.Tensor] = {}
    for name, component in layer.layout.components.items():
        part = torch.from_numpy(bundle[component.offset : component.offset + component.nbytes])
        matrix[name] = part.view(DTYPE_OF_FORMAT[layer.layout.format]).view(component.shape).float()
    x = hidden.float()
    return matrix["down"] @ (F.silu(matrix["gate"] @ x) * (matrix["up"] @ x))


def _measure(report: Report, runtime: Runtime, inputs: Sequence[Inputs], bandwidth: float, rounds: int) -> None:
    real, null = runtime.device, NullDevice()
    calls = _record(runtime, inputs, null)

    def steps(device: Device) -> float:
        runtime.device = device
        try:
            return _per_layer_us([partial(_step, runtime, one) for one in inputs])
        finally:
            runtime.device = real

    def kernels() -> float:
        return _per_layer_us([partial(_kernel, real, call) for call in calls])

    turns = {"step": lambda: steps(real), "kernel": kernels, "null": lambda: steps(null)}
    interleave(turns, 2)
    us = interleave(turns, rounds)
    beyond = [step - kernel for step, kernel in zip(us["step"], us["kernel"], strict=True)]
    nbytes = sum(len(call.batch.addresses) * call.layer.layout.nbytes for call in calls) / len(calls)
    speed = nbytes / (Spread.of(us["kernel"]).median * 1e-6)
    report.tables.setdefault("A MoE layer, microseconds", []).append(
        {
            "tokens": len(inputs[0].hidden),
            "step": Spread.of(us["step"]),
            "kernel alone": Spread.of(us["kernel"]),
            "step - kernel": Spread.of(beyond),
            "step, null device": Spread.of(us["null"]),
            "MB of experts": nbytes / 1e6,
            "kernel GB/s": speed / 1e9,
            "share of memory bandwidth": speed / bandwidth,
        }
    )


def _record(runtime: Runtime, inputs: Sequence[Inputs], null: NullDevice) -> list[Call]:
    """The calls that the device gets, one a layer; the experts stay where they are as all are resident."""
    real = runtime.device
    calls: list[Call] = []
    null.recorded = calls
    runtime.device = null
    try:
        for one in inputs:
            _step(runtime, one)
    finally:
        runtime.device = real
        null.recorded = None
    if len(calls) != len(inputs):
        raise RuntimeError(f"{len(calls)} calls of the device in {len(inputs)} layers: experts are not all resident")
    return calls


def _step(runtime: Runtime, inputs: Inputs) -> None:
    runtime.step(inputs.layer, inputs.hidden, inputs.index, inputs.weights)


def _kernel(device: Device, call: Call) -> None:
    device.run_experts(call.layer, call.batch, call.hidden, call.out)


def _per_layer_us(layers: Sequence[Callable[[], None]]) -> float:
    before = perf_counter()
    for layer in layers:
        layer()
    return 1e6 * (perf_counter() - before) / len(layers)
