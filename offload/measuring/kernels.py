"""Calls of the runtime's kernels on weights that are not in the CPU's caches."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from cpu_kernels.tape import Choice, Tape
from cpu_kernels.wide_linear import takes_panels
from formats.bundle import MATRICES, BundleLayout
from formats.packed import PACKED_FORMATS
from offload.devices.base import Device, ExpertBatch
from offload.devices.host import HostDevice
from offload.devices.host_threads import kernel_pool
from offload.hf.dtypes import DTYPE_OF_FORMAT
from offload.hf.fused import fuse
from offload.hf.fused.attention import attend
from offload.hf.quantised_linear import QuantisedLinear
from offload.moe.layer import ExpertsLayer
from offload.packing import pack_tensor
from profiler.subjects import Attention, Product

HIDDEN, INTERMEDIATE = 2048, 768
NARROW_HIDDEN, NARROW_INTERMEDIATE = 512, 256
HEADS, KV_HEADS, HEAD_WIDTH, NARROW_HEAD_WIDTH = 32, 4, 128, 64
_IN_A_ROW, _MOST_TAPED = 4, 8
"""Linear layers of a run, as many as a layer of a model has, and tokens up to which there are such runs."""
_MOST_TAPED_EXPERTS = 2
"""Tokens of an expert up to which it is computed on a tape: in batches, decode has about as many, prompts more."""
COLD_NBYTES = 256 << 20
"""Calls take their weights from so many bytes in turn: more than caches hold."""
_NARROW_SHARE = 2
"""Of these bytes, narrow experts have one in so many: they are still more than caches hold."""


class Gate(torch.nn.Module):
    """What the runtime asks of an experts module: its gate."""

    is_concatenated = True

    def _apply_gate(self, projected: torch.Tensor) -> torch.Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return F.silu(gate) * up


def compute_dtype(format: str) -> torch.dtype:
    """In which a model with weights of this format computes here."""
    return torch.bfloat16 if format in PACKED_FORMATS else DTYPE_OF_FORMAT[format]


@lru_cache(maxsize=16)
def random_bundle(layout: BundleLayout) -> npt.NDArray[np.uint8]:
    """An expert of small random weights; kept, because packing it takes longer than measuring."""
    out = np.zeros(layout.nbytes, np.uint8)
    generator = torch.Generator().manual_seed(1)

    def part(name: str) -> npt.NDArray[np.uint8]:
        component = layout.components[name]
        return out[component.offset : component.offset + component.nbytes]

    for name in MATRICES:
        weights = 0.02 * torch.randn(layout.shape(name), generator=generator)
        if layout.is_packed:
            pack_tensor(weights, layout.matrix(name), part(name), part(f"{name}_scale"), name)
        else:
            stored = weights.to(DTYPE_OF_FORMAT[layout.format])
            part(name)[:] = stored.view(torch.uint8).reshape(-1).numpy()
    return out


def uneven_loads(count: int, tokens: int) -> npt.NDArray[np.int64]:
    """Numbers of tokens of `count` experts, `tokens` on average, at equal steps of a normal law as wide as Poisson's.

    Kernels take tokens in groups of a few, so that numbers which divide well would be faster than those that come.
    """
    if tokens == 1:
        return np.ones(count, np.int64)
    law = NormalDist(tokens, math.sqrt(tokens))
    loads = np.rint([max(0.0, law.inv_cdf((place + 0.5) / count)) for place in range(count)]).astype(np.int64)
    # Rounding leaves a token or two too many or too few, which the one in the middle takes.
    loads[count // 2] += count * tokens - loads.sum()
    return loads


def chosen_by(loads: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Experts that each token chooses, different ones, [tokens, k], so that each has its load.

    As many tokens as the largest load, or as few more as share the pairs out evenly.
    """
    pairs = np.repeat(np.arange(len(loads)), loads)
    tokens = next(count for count in range(int(loads.max()), len(pairs) + 1) if len(pairs) % count == 0)
    # An expert's pairs are neighbours, and so go to different tokens.
    return np.ascontiguousarray(pairs.reshape(-1, tokens).T)


class ExpertCalls:
    """Experts of one layer: those of one or two tokens on a tape, as a decode step has them, others as the MoE step
    calls the host device. All calls take the next of the same weights.
    """

    def __init__(
        self, format: str, *, narrow: bool = False, device: Device | None = None, cold_nbytes: int = 0, fewest: int = 8
    ) -> None:
        """Fill slots.

        Args:
            format: of the experts.
            narrow: of few weights for each entry.
            device: that has the slots and computes; None for the host.
            cold_nbytes: of slots, narrow ones take a share of them; 0 for COLD_NBYTES.
            fewest: slots at least.
        """
        self.format = format
        sizes = (NARROW_HIDDEN, NARROW_INTERMEDIATE) if narrow else (HIDDEN, INTERMEDIATE)
        self._layout = layout = BundleLayout(*sizes, format)
        cold_nbytes = cold_nbytes or COLD_NBYTES
        self._copies = max(fewest, cold_nbytes // (_NARROW_SHARE if narrow else 1) // layout.nbytes)
        self._device = HostDevice() if device is None else device
        self._slab = self._device.allocate(self._copies * layout.nbytes)
        places = self._slab.tensor()[: self._copies * layout.nbytes].view(-1, layout.nbytes)
        places.copy_(torch.from_numpy(random_bundle(layout)).to(places.device))
        self._where = places.device
        self._next = 0
        dtype = compute_dtype(format)
        self._layer = ExpertsLayer("profile", 0, self._copies, layout, dtype, Gate(), "silu")

    def product(self, count: int, tokens: int) -> Product:
        """`count` experts with `tokens` tokens each on average, as uneven as a router makes them."""
        hidden_size, intermediate = self._layout.hidden, self._layout.intermediate
        weights = 3 * hidden_size * intermediate * count
        # Packed kernels round what enters and leaves, those for panels lay it out. Others do neither, and what narrow
        # experts take there is not of their entries.
        prepares = self._layout.is_packed or takes_panels(self._layer.dtype)
        entries = (hidden_size + 3 * intermediate) * count if prepares else 0
        loads = uneven_loads(count, tokens)
        if tokens <= _MOST_TAPED_EXPERTS:
            return Product(weights, self._taped(loads), entries, _IN_A_ROW, count)
        return Product(weights, self._called(loads), entries, items=count)

    def _called(self, loads: npt.NDArray[np.int64]) -> Callable[[], None]:
        """The next experts with so many tokens each, as a step calls the device: hidden states are where it computes,
        outputs go to the host.
        """
        offsets = np.concatenate([[0], np.cumsum(loads)])
        rows = np.arange(int(offsets[-1]), dtype=np.int64)
        taken = np.concatenate([np.arange(load, dtype=np.int64) for load in loads])
        hidden = torch.randn(int(loads.max()), self._layout.hidden).to(self._where, self._layer.dtype)
        out = torch.empty(len(rows), self._layout.hidden)

        def call() -> None:
            batch = ExpertBatch(self._addresses(len(loads)), offsets, taken, rows)
            with torch.no_grad():
                self._device.run_experts(self._layer, batch, hidden, out)

        return call

    def _taped(self, loads: npt.NDArray[np.int64]) -> Callable[[], None]:
        """The next experts with so many tokens each, _IN_A_ROW times."""
        count, tape = len(loads), Tape(self._layer.dtype)
        ids = torch.from_numpy(chosen_by(loads))
        choice = Choice(ids, torch.ones(ids.shape), torch.empty(len(ids), count))
        hidden = torch.randn(len(ids), self._layout.hidden).to(self._layer.dtype)
        tables = np.zeros((_IN_A_ROW, count), np.int64)
        for addresses in tables:
            tape.experts(self._layout, "silu", addresses, choice, hidden.data_ptr())

        def call(_kept: tuple[torch.Tensor, Choice] = (hidden, choice)) -> None:
            for addresses in tables:
                addresses[:] = self._addresses(count)
            tape.play(kernel_pool())

        return call

    def close(self) -> None:
        """Give the slots back."""
        self._slab.discard(0, self._slab.nbytes)

    def _addresses(self, count: int) -> npt.NDArray[np.intp]:
        chosen = np.arange(self._next, self._next + count) % self._copies
        self._next = int(chosen[-1] + 1) % self._copies
        return (self._slab.address + chosen * self._layout.nbytes).astype(np.intp)


class LinearCalls:
    """Linear layers of `rows` outputs and HIDDEN inputs as a loaded model calls them, in turn: those of decode from a
    tape, some in a row, others one by one from Python.

    In half as many bytes as experts: making them takes longer than measuring.
    """

    def __init__(self, format: str, rows: int) -> None:
        self.format = format
        self._dtype = compute_dtype(format)
        self._rows = rows
        first = random_linear(format, rows)
        held = sum(t.nbytes for t in [*first.parameters(), *first.buffers()])
        count = min(64, max(_IN_A_ROW, COLD_NBYTES // 2 // held))
        layers = [copy.deepcopy(first) for _ in range(count)]
        self._layers = torch.nn.ModuleList(layers).requires_grad_(False)
        fuse(self._layers, ["linear"])  # type: ignore[arg-type]
        self._turn: Iterator[Any] = itertools.cycle(self._layers)

    def product(self, tokens: int) -> Product:
        """Calls with `tokens` tokens."""
        x = torch.randn(1, tokens, HIDDEN).to(self._dtype)
        if tokens <= _MOST_TAPED:
            return Product(self._rows * HIDDEN, self._taped(x), self._rows + HIDDEN, _IN_A_ROW)

        def call() -> None:
            with torch.no_grad():
                next(self._turn)(x)

        return Product(self._rows * HIDDEN, call, self._rows + HIDDEN)

    def _taped(self, x: torch.Tensor) -> Callable[[], None]:
        """The next _IN_A_ROW layers."""
        tokens = x.shape[1]
        out = torch.empty(tokens, self._rows, dtype=x.dtype)
        tape = Tape(x.dtype)
        for layer in self._layers:
            if isinstance(layer, QuantisedLinear):
                tape.packed_linear(x.data_ptr(), layer.weights, None, tokens, out.data_ptr())
            else:
                tape.linear(x.data_ptr(), layer.get_parameter("weight"), None, tokens, out.data_ptr())
        runs = itertools.cycle(range(0, tape.rows - _IN_A_ROW + 1, _IN_A_ROW))

        def call(_kept: tuple[torch.Tensor, ...] = (x, out)) -> None:
            first = next(runs)
            tape.play(kernel_pool(), first, first + _IN_A_ROW)

        return call


@lru_cache(maxsize=32)
def random_linear(format: str, rows: int) -> torch.nn.Module:
    """A layer of small random weights that nobody changes; kept, because packing it takes longer than measuring."""
    weight = (0.02 * torch.randn(rows, HIDDEN)).to(compute_dtype(format))
    if format in PACKED_FORMATS:
        return QuantisedLinear(weight, None, format, "profile")
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return layer


class _Attends(torch.nn.Module):
    """What attention functions ask of an attention module."""

    is_causal = True
    num_key_value_groups = HEADS // KV_HEADS


def attention_calls(new_tokens: int, cached_tokens: int, *, narrow: bool = False) -> Attention:
    """Attention of one layer with grouped heads in bf16, as a loaded model calls it."""
    seen, width = cached_tokens + new_tokens, NARROW_HEAD_WIDTH if narrow else HEAD_WIDTH
    dtype = torch.bfloat16
    query = torch.randn(1, HEADS, new_tokens, width).to(dtype)
    copies = max(1, min(64, COLD_NBYTES // (seen * KV_HEADS * width * 4)))
    first = torch.randn(1, KV_HEADS, seen, width).to(dtype)
    caches = itertools.cycle([(first.clone(), first.clone()) for _ in range(copies)])
    module = _Attends()

    def run() -> None:
        key, value = next(caches)
        with torch.no_grad():
            attend(module, query, key, value, None)

    scores = HEADS * new_tokens * (cached_tokens + (new_tokens + 1) / 2)
    return Attention(seen * KV_HEADS * width * 4, 4.0 * width * scores, run, scores=scores)
