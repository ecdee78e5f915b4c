"""What it takes to sum experts' outputs group by group instead of all at once."""

from __future__ import annotations

import statistics

import numpy as np
import torch

from offload.moe.accumulate import Accumulator, OrderedAccumulator, PairAccumulator
from offload.moe.in_order import next_group
from offload.moe.routing import Routing, route
from profiler.timing import repeated

_TOKENS, _EXPERTS, _TOP_K, _HIDDEN = 256, 32, 8, 2048
"""Together 16 MiB of outputs, four groups: as many as no cache of a core holds."""
_REPEATS = 5


def grouped_output_s() -> float:
    """Seconds for each number that experts put out, beyond those where all are kept and summed at once; never below
    zero. Whoever computes the experts leaves a group in the caches and many of them in memory, as is done here.
    """
    ids = torch.rand(_TOKENS, _EXPERTS, generator=torch.Generator().manual_seed(3)).topk(_TOP_K).indices
    routing = route(ids, torch.full((_TOKENS, _TOP_K), 1 / _TOP_K), _EXPERTS)

    def in_groups() -> None:
        _sum(routing, OrderedAccumulator(routing, _HIDDEN))

    def at_once() -> None:
        _sum(routing, PairAccumulator(routing, _HIDDEN))

    grouped_s, whole_s = (
        statistics.median(repeated(call, budget_s=0.0, fewest=_REPEATS)) for call in (in_groups, at_once)
    )
    return max(0.0, grouped_s - whole_s) / (_TOKENS * _TOP_K * _HIDDEN)


def _sum(routing: Routing, accumulator: Accumulator) -> torch.Tensor:
    """As a step does with experts that are all there."""
    numbers, sizes = range(len(routing.experts)), np.diff(routing.offsets).tolist()
    first, there = 0, set(numbers)
    while first < len(numbers):
        group = next_group(numbers, first, there, sizes, accumulator.most_pairs, len(numbers))
        _, pairs = routing.select(group)
        accumulator.target(pairs)
        accumulator.added(pairs)
        first += len(group)
    return accumulator.result()
