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
from prefetch.scheduler.timeline_kernel import (
    BOTH,
    CPU_FIRST,
    DISK,
    DISK_BEFORE,
    GPU_BEFORE,
    LINK,
    LINK_BEFORE,
    ON_CPU,
    ON_DISK,
    ON_GPU,
    RAM,
)


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
def _ends_at(on_disk: int, in_ram: int, cached: int, copies: int, left: int, bits: int, load: int, costs: Any) -> Any:
    """When the last expert is done; resources serve in the order of `run_timeline`."""
    link_s, gpu_s, cpu_s = costs[LINK], gpu_expert_s(costs, load), cpu_expert_s(costs, load)
    copied_reads = 0
    for read in range(on_disk):
        copied_reads += (bits >> read) & 1
    at_once = left + in_ram - (copies - copied_reads)
    cold = costs[CPU_FIRST]
    cpu, link, gpu = 0.0, costs[LINK_BEFORE], costs[GPU_BEFORE] + (cached - left) * gpu_s
    if at_once > 0:
        cpu, cold = cold + at_once * cpu_s, 0.0
    for _ in range(copies - copied_reads):
        link += link_s
        gpu = max(gpu, link) + gpu_s
    arrival = costs[DISK_BEFORE]
    for read in range(on_disk):
        arrival += costs[DISK]
        if (bits >> read) & 1:
            link = max(link, arrival) + link_s
            gpu = max(gpu, link) + gpu_s
        else:
            cpu = max(cpu, arrival) + cpu_s + cold
            cold = 0.0
    return max(cpu, gpu)


@inner
def best_of_equals(loads: Any, homes: Any, costs: Any, units: Any) -> None:
    """Fill `units` with the best mapping; all loads are equal, at most 64 experts are on disk.

    Args:
        loads: int64 [n].
        homes: int64 [n].
        costs: float64 [10].
        units: int64 [n].
    """
    in_ram, cached, movable, on_disk = 0, 0, 0, 0
    for expert in range(len(homes)):
        in_ram += homes[expert] == RAM
        cached += homes[expert] <= BOTH
        movable += homes[expert] == BOTH
        on_disk += homes[expert] == ON_DISK
    load, uncached = loads[0], in_ram + on_disk
    gpu_s, cpu_s = gpu_expert_s(costs, load), cpu_expert_s(costs, load)
    best, best_copies, best_left, best_bits = np.inf, 0, 0, 0
    for copies in range(uncached + 1):
        linked = costs[LINK_BEFORE] + copies * costs[LINK] + gpu_s if copies else 0.0
        for left in range(movable + 1):
            # No sooner than each of the three with all its work in a row.
            queued = max((uncached - copies + left) * cpu_s, costs[GPU_BEFORE] + (cached + copies - left) * gpu_s)
            if max(linked, queued) >= best:
                continue
            bits = _last_come_last_served(on_disk, copies, uncached - copies + left, left, load, costs)
            end = _ends_at(on_disk, in_ram, cached, copies, left, bits, load, costs)
            if end < best:
                best, best_copies, best_left, best_bits = end, copies, left, bits
    _fill(homes, best_copies, best_left, best_bits, units)
