"""Passes whose experts all come from disk: how reads and kernels of prompts slow each other down, what arriving takes.

Measured on a model's own layers, because kernels that begin and end as experts arrive, one at a time, on threads that
sleep in between, are not the kernels that can be repeated beside a long read.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol, TypeVar

import numpy as np

from offload.runtime import Runtime
from placement.disk import Overlap
from placement.planner import READER_THREADS

_LEAST = 0.05
"""Share that noise may leave."""
_HALVINGS = 40


def _bytes_per_s(loads: int, nbytes: int, seconds: float) -> float:
    return loads * nbytes / max(seconds, 1e-9)


@dataclass(frozen=True)
class PromptFromDisk:
    """The MoE layers of a prompt, whose experts all come from disk.

    Attributes:
        tokens: of an expert, on average.
        layers_s: seconds in MoE layers beyond what these take beside experts with everything in RAM.
        kernels_s: of them, in kernels.
        alone_s: of kernels with everything in RAM, if each expert had a call of its own, as those that arrive do.
        waiting_s: of `layers_s`, for reads.
        reads_s: of the same reads alone.
        loads: experts that were read.
        layers: MoE layers.
        nbytes: of an expert.
    """

    tokens: int
    layers_s: float
    kernels_s: float
    alone_s: float
    waiting_s: float
    reads_s: float
    loads: int
    layers: int
    nbytes: int

    @property
    def _last_s(self) -> float:
        """Of the experts that arrive last in their layers: nothing is read beside them."""
        return self.layers * self.alone_s / self.loads

    @property
    def overlap(self) -> Overlap:
        """Kernels have the share of their speed that they had; reads that were not waited for went on meanwhile."""
        beside_s = max(self.kernels_s - self._last_s, 1e-9)
        kernels = min(1.0, max(_LEAST, (self.alone_s - self._last_s) / beside_s))
        reads = (self.reads_s - self.waiting_s) / beside_s
        return Overlap(
            self.tokens, min(1.0, max(_LEAST, reads, 1 - kernels)), kernels,
            _bytes_per_s(self.loads, self.nbytes, self.reads_s),
        )  # fmt: skip

    @property
    def arrival_s(self) -> float:
        """Of each expert, what is neither in kernels nor waiting for reads: asking for it, a slot for it, hearing that
        it is there. Alone, as kernels are told: beside reads it is taken to be longer by as much as they.
        """
        return self.overlap.kernels * max(0.0, self.layers_s - self.kernels_s - self.waiting_s) / self.loads


class _Clock(Protocol):
    """Seconds that kernels of experts took since it was set to 0."""

    experts_s: float


def prompt_from_disk(
    runtime: Runtime, clock: _Clock, run: Callable[[], object], tokens: int, call_s: float,
    read: Callable[[int, int], float],
) -> PromptFromDisk:  # fmt: skip
    """A pass with everything in RAM and one with nothing, and the reads alone.

    Args:
        runtime: with a slot for every expert; all are there before and after.
        clock: of its device.
        run: the pass, which looks for its experts in every layer.
        tokens: of an expert, on average.
        call_s: of a call of experts whatever its size.
        read: seconds of reading blocks of some bytes, so many, alone.
    """
    every = range(runtime.plan.expert_count)
    inside = _in_layers(runtime, clock, run)
    for key in every:
        runtime.tier.evict(key)
    before = runtime.tier.counters.loads
    outside = _in_layers(runtime, clock, run)
    loads, layers = runtime.tier.counters.loads - before, len(runtime.layers)
    runtime.tier.fetch(every, lambda _key: None)
    reads_s, _ = _alone(runtime, loads, read)
    return PromptFromDisk(
        tokens, outside[0] - (inside[0] - inside[1]), outside[1], inside[1] + (loads - layers) * call_s, outside[2],
        reads_s, loads, layers, runtime.plan.slot_nbytes,
    )  # fmt: skip


def _in_layers(runtime: Runtime, clock: _Clock, run: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds of a pass in MoE layers: all, in kernels, waiting for reads."""
    before = runtime.stats()
    clock.experts_s = 0.0
    run()
    after = runtime.stats()
    return after.moe_s - before.moe_s, clock.experts_s, after.read_stall_s - before.read_stall_s


@dataclass(frozen=True)
class DecodeFromDisk:
    """The MoE layers of a pass of one token, whose experts all come from disk into a cache that others leave.

    Kernels run on a tape there, where nobody sees how long they take.

    Attributes:
        layers_s: seconds in MoE layers.
        reads_s: of the same reads alone.
        first_s: of them, until the first are there.
        loads: experts that were read.
        layers: MoE layers.
        nbytes: of an expert.
    """

    layers_s: float
    reads_s: float
    first_s: float
    loads: int
    layers: int
    nbytes: int

    def arrival_s(self, expert_s: float, call_s: float, step_s: float, overlap: Overlap) -> float:
        """Seconds for each expert that make `placement.expert_cost` right: those of a call, and whatever else arriving
        takes.

        Args:
            expert_s: of an expert's kernel, alone.
            call_s: of a call of kernels.
            step_s: of a layer, for looking for its experts.
            overlap: of reads and kernels.
        """
        overlap = overlap.beside(_bytes_per_s(self.loads, self.nbytes, self.reads_s))
        each, reads_s = self.loads / self.layers, self.reads_s / self.layers
        idle_s = min(self.first_s / self.layers, reads_s)

        def layer_s(arrival_s: float) -> float:
            last_s = expert_s + arrival_s
            rest_s = call_s + each * last_s - last_s
            both_s = float(overlap.seconds(np.array(rest_s), np.array(reads_s - idle_s)))
            return step_s + idle_s + both_s + last_s

        wanted_s, low, high = self.layers_s / self.layers, 0.0, self.layers_s
        # More for each never makes a layer faster, so halving finds where it is as slow as it was.
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if layer_s(middle) < wanted_s else (low, middle)
        return low


def decode_from_disk(runtime: Runtime, run: Callable[[], object], read: Callable[[int, int], float]) -> DecodeFromDisk:
    """A pass with other experts in RAM, and the reads alone; see `prompt_from_disk`."""
    needed = _after(runtime, run)
    others = [key for key in range(runtime.plan.expert_count) if key not in needed][: runtime.plan.ram_slots]
    _after(runtime, lambda: runtime.tier.fetch(others, lambda _key: None))
    before = runtime.stats()
    run()
    after = runtime.stats()
    loads, layers = after.misses - before.misses, len(runtime.layers)
    reads_s, first_s = _alone(runtime, loads, read)
    return DecodeFromDisk(after.moe_s - before.moe_s, reads_s, first_s, loads, layers, runtime.plan.slot_nbytes)


def _after(runtime: Runtime, bring: Callable[[], object]) -> set[int]:
    """The experts that are there when something brought them to where none was."""
    for key in list(runtime.tier.table):
        runtime.tier.evict(key)
    bring()
    return set(runtime.tier.table)


def _alone(runtime: Runtime, loads: int, read: Callable[[int, int], float]) -> tuple[float, float]:
    """Seconds of a pass's reads, and of those that are there first, layer by layer."""
    nbytes, layers = runtime.plan.slot_nbytes, len(runtime.layers)
    each = round(loads / layers)
    return (
        sum(read(nbytes, each) for _ in range(layers)),
        sum(read(nbytes, min(each, READER_THREADS)) for _ in range(layers)),
    )


_Found = TypeVar("_Found", PromptFromDisk, DecodeFromDisk)


def median_of(found: Sequence[_Found]) -> _Found:
    """Of each part; counts are those of one of the passes in the middle."""
    parts = [statistics.median_low(values) for values in zip(*map(astuple, found), strict=True)]
    return type(found[0])(*parts)
