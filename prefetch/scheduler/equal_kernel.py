# mypy: allow-untyped-calls
"""The best mapping of experts of equal load, reads included: decode's case.

Given how many experts are copied and how many cached ones are left to the CPU, all lengths of queues are known, and so
are the latest moments at which each place of a queue can start, counted back from the end: a place i from the end of
the CPU's starts i experts before it, one of the link's a copy and i of the slower of copying and computing before it.
Whoever arrives last takes the place that starts last (an exchange of two experts shows that no other assignment ends
sooner), whatever the end is. So all pairs of numbers are tried, one mapping each.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import inner
from prefetch.scheduler.greedy_kernel import cpu_expert_s, gpu_expert_s
from prefetch.scheduler.timeline_kernel import BOTH, CPU_FIRST, LINK, ON_CPU, ON_DISK, ON_GPU, RAM, run_timeline


@inner
def _last_come_last_served(on_disk: int, copies: int, cpu: int, left: int, load: int, costs: Any) -> int:
    """How many of the last to arrive are the link's, written as bits: bit i says that read i is copied."""
    link_s, gpu_s, cpu_s = costs[LINK], gpu_expert_s(costs, load), cpu_expert_s(costs, load)
    bits, linked, computed = 0, 0, 0
    for read in range(on_disk - 1, -1, -1):
        link_start = -(link_s + gpu_s + linked * max(link_s, gpu_s))
        cpu_start = -cpu_s * (computed + 1)
        if computed + 1 == cpu:
            cpu_start -= costs[CPU_FIRST]
        if linked < copies and (computed == cpu - left or link_start >= cpu_start):
            bits |= 1 << read
            linked += 1
        else:
            computed += 1
    return bits


@inner
def _fill(homes: Any, copies: int, left: int, bits: int, units: Any) -> None:
    """Reads as `bits` says, in the order of experts; further copies are of those in RAM; `left` cached ones stay."""
    for read in range(len(homes)):
        copies -= (bits >> read) & 1
    read = 0
    for expert in range(len(homes)):
        units[expert] = ON_GPU
        if homes[expert] == BOTH and left > 0:
            units[expert] = ON_CPU
            left -= 1
        elif homes[expert] == RAM:
            units[expert] = ON_GPU if copies > 0 else ON_CPU
            copies -= 1
        elif homes[expert] == ON_DISK:
            units[expert] = ON_GPU if (bits >> read) & 1 else ON_CPU
            read += 1


@inner
def best_of_equals(loads: Any, homes: Any, costs: Any, units: Any, table: Any) -> None:
    """Fill `units` with the best mapping; all loads are equal, at most 64 experts are on disk.

    Args:
        loads: int64 [n].
        homes: int64 [n].
        costs: float64 [10].
        units: int64 [n].
        table: orders, counts and times for `run_timeline`, overwritten.
    """
    orders, counts, times = table
    uncached, movable, on_disk = 0, 0, 0
    for expert in range(len(homes)):
        uncached += homes[expert] >= RAM
        movable += homes[expert] == BOTH
        on_disk += homes[expert] == ON_DISK
    trial = np.zeros(len(loads), np.int64)
    best = np.inf
    for copies in range(uncached + 1):
        for left in range(movable + 1):
            bits = _last_come_last_served(on_disk, copies, uncached - copies + left, left, loads[0], costs)
            _fill(homes, copies, left, bits, trial)
            cpu, gpu = run_timeline(trial, loads, homes, costs, orders, counts, times)
            if max(cpu, gpu) < best:
                best = max(cpu, gpu)
                units[:] = trial
