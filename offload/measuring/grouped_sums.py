"""What it takes to sum experts' outputs group by group instead of all at once."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter

import torch

from offload.moe.accumulate import Accumulator, OrderedAccumulator, PairAccumulator
from offload.moe.routing import Routing, route

_TOKENS, _EXPERTS, _TOP_K, _HIDDEN = 256, 32, 8, 2048
"""Together 16 MiB of outputs: the most that a step keeps."""
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

    grouped, whole = _seconds(in_groups), _seconds(at_once)
    return max(0.0, statistics.median(grouped) - statistics.median(whole)) / (_TOKENS * _TOP_K * _HIDDEN)


def _sum(routing: Routing, accumulator: Accumulator) -> torch.Tensor:
    """As a step does with experts that are all there."""
    first = 0
    while first < len(routing.experts):
        last = first + 1
        while last < len(routing.experts) and _pairs(routing, first, last + 1) <= accumulator.most_pairs:
            last += 1
        _, pairs = routing.select(range(first, last))
        accumulator.target(pairs)
        accumulator.added(pairs)
        first = last
    return accumulator.result()


def _pairs(routing: Routing, first: int, last: int) -> int:
    return int(routing.offsets[last] - routing.offsets[first])


def _seconds(call: Callable[[], None]) -> list[float]:
    """Of repeats, after a first that does not count."""
    found = []
    for _ in range(_REPEATS + 1):
        before = perf_counter()
        call()
        found.append(perf_counter() - before)
    return found[1:]
