# mypy: allow-untyped-calls
"""HybriMoE's greedy (arXiv 2504.05897, section 4.2): of what the CPU, the GPU and the link could do next,
commit what would be complete first. Experts are numbered by load, descending.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import inner
from prefetch.scheduler.timeline_kernel import (
    BOTH,
    CPU_EXPERT,
    CPU_FIRST,
    CPU_TOKEN,
    DISK,
    DISK_BEFORE,
    GPU_BEFORE,
    GPU_EXPERT,
    GPU_TOKEN,
    LINK,
    LINK_BEFORE,
    ON_CPU,
    ON_DISK,
    ON_GPU,
    RAM,
    VRAM,
)


@inner
def ascending(homes: Any, least: int, most: int) -> Any:
    """Experts whose home is between `least` and `most`, by load ascending; experts are numbered by load, descending."""
    found = np.empty(len(homes), np.int64)
    count = 0
    for expert in range(len(homes) - 1, -1, -1):
        if least <= homes[expert] <= most:
            found[count] = expert
            count += 1
    return found[:count]


@inner
def gpu_expert_s(costs: Any, load: int) -> Any:
    """The GPU's seconds for an expert with `load` tokens."""
    return costs[GPU_EXPERT] + costs[GPU_TOKEN] * load


@inner
def cpu_expert_s(costs: Any, load: int) -> Any:
    """The CPU's seconds for an expert with `load` tokens."""
    return costs[CPU_EXPERT] + costs[CPU_TOKEN] * load


@inner
def _arrivals(homes: Any, costs: Any) -> Any:
    """When each expert is in RAM: those on disk are read by load, descending."""
    ready = np.zeros(len(homes))
    on_disk = ascending(homes, ON_DISK, ON_DISK)
    clock = costs[DISK_BEFORE]
    for expert in on_disk[::-1]:
        clock += costs[DISK]
        ready[expert] = clock
    return ready


@inner
def _earliest_on_gpu(loads: Any, homes: Any, ready: Any, taken: Any, gpu: float, costs: Any) -> Any:
    """(expert, finish) of the cached expert that the GPU completes first; more tokens win a tie; -1 for none."""
    best, finish = -1, np.inf
    for expert in range(len(loads)):
        if taken[expert] == 0 and homes[expert] <= BOTH:
            f = max(gpu, ready[expert]) + gpu_expert_s(costs, loads[expert])
            if best < 0 or f < finish or (f == finish and loads[expert] > loads[best]):
                best, finish = expert, f
    return best, finish


@inner
def _earliest_on_cpu(loads: Any, homes: Any, ready: Any, taken: Any, cpu: float, costs: Any, least_home: int) -> Any:
    """(expert, finish) of the expert that the CPU completes first; -1 for none."""
    best, finish = -1, np.inf
    for expert in range(len(loads)):
        # A cached expert that was copied in this layer is the GPU's.
        if taken[expert] == 0 and homes[expert] >= least_home:
            f = max(cpu, ready[expert]) + cpu_expert_s(costs, loads[expert])
            if f < finish:
                best, finish = expert, f
    return best, finish


@inner
def _latest_to_copy(loads: Any, homes: Any, ready: Any, taken: Any, link: float, costs: Any) -> Any:
    """(expert, finish) of the uncached expert with the most tokens, of those that arrive on the GPU first."""
    best, finish = -1, np.inf
    for expert in range(len(loads)):
        if taken[expert] == 0 and homes[expert] >= RAM:
            f = max(link, ready[expert]) + costs[LINK]
            if best < 0 or f < finish or (f == finish and loads[expert] > loads[best]):
                best, finish = expert, f
    return best, finish


@inner
def earliest_completion(loads: Any, homes: Any, costs: Any, units: Any) -> None:
    """Fill `units` by HybriMoE's greedy; ties go to the CPU, then to the GPU."""
    count = len(loads)
    where = homes.copy()
    ready = _arrivals(homes, costs)
    taken = np.zeros(count, np.int64)
    copied = np.zeros(count, np.int64)
    cpu, gpu, link = 0.0, costs[GPU_BEFORE], costs[LINK_BEFORE]
    first = costs[CPU_FIRST]
    left = count
    while left > 0:
        on_cpu, cpu_done = _earliest_on_cpu(loads, where, ready, taken, cpu, costs, RAM)
        if on_cpu < 0:
            # Nothing uncached is left: the CPU helps with the cached expert of the fewest tokens.
            for expert in range(count):
                here = taken[expert] == 0 and homes[expert] == BOTH and copied[expert] == 0
                if here and (on_cpu < 0 or loads[expert] < loads[on_cpu]):
                    on_cpu = expert
                    cpu_done = cpu + cpu_expert_s(costs, loads[expert])
        cpu_done += first
        on_gpu, gpu_done = _earliest_on_gpu(loads, where, ready, taken, gpu, costs)
        to_copy, copy_done = _latest_to_copy(loads, where, ready, taken, link, costs)
        if on_cpu >= 0 and cpu_done <= gpu_done and cpu_done <= copy_done:
            units[on_cpu] = ON_CPU
            taken[on_cpu] = 1
            cpu, first = cpu_done, 0.0
            left -= 1
        elif on_gpu >= 0 and gpu_done <= copy_done:
            units[on_gpu] = ON_GPU
            taken[on_gpu] = 1
            gpu = gpu_done
            left -= 1
        else:
            where[to_copy] = VRAM
            copied[to_copy] = 1
            ready[to_copy] = copy_done
            link = copy_done
