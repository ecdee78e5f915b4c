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
def _is_sooner(finish: float, load: int, best: int, best_finish: float, loads: Any) -> bool:
    """More tokens win a tie."""
    return bool(best < 0 or finish < best_finish or (finish == best_finish and load > loads[best]))


@inner
def earliest_completion(loads: Any, homes: Any, costs: Any, units: Any) -> None:
    """Fill `units` by HybriMoE's greedy; ties go to the CPU, then to the GPU."""
    count = len(loads)
    where, left, ready = homes.copy(), np.arange(count), _arrivals(homes, costs)
    cpu, gpu, link = 0.0, costs[GPU_BEFORE], costs[LINK_BEFORE]
    first = costs[CPU_FIRST]
    while count > 0:
        on_cpu, on_gpu, to_copy, helped = -1, -1, -1, -1
        cpu_done, gpu_done, copy_done = np.inf, np.inf, np.inf
        for place in range(count):
            expert = left[place]
            load = loads[expert]
            if where[expert] >= RAM:
                done = max(cpu, ready[expert]) + cpu_expert_s(costs, load)
                if done < cpu_done:
                    on_cpu, cpu_done = expert, done
                done = max(link, ready[expert]) + costs[LINK]
                if _is_sooner(done, load, to_copy, copy_done, loads):
                    to_copy, copy_done = expert, done
                continue
            done = max(gpu, ready[expert]) + gpu_expert_s(costs, load)
            if _is_sooner(done, load, on_gpu, gpu_done, loads):
                on_gpu, gpu_done = expert, done
            # What was copied in this layer is the GPU's.
            if where[expert] == BOTH and (helped < 0 or load < loads[helped]):
                helped = expert
        if on_cpu < 0 and helped >= 0:
            # Nothing uncached is left: the CPU helps with the cached expert of the fewest tokens.
            on_cpu, cpu_done = helped, cpu + cpu_expert_s(costs, loads[helped])
        cpu_done += first
        if on_cpu >= 0 and cpu_done <= gpu_done and cpu_done <= copy_done:
            units[on_cpu], cpu, first = ON_CPU, cpu_done, 0.0
            count = _remove(left, count, on_cpu)
        elif on_gpu >= 0 and gpu_done <= copy_done:
            units[on_gpu], gpu = ON_GPU, gpu_done
            count = _remove(left, count, on_gpu)
        else:
            where[to_copy], ready[to_copy], link = VRAM, copy_done, copy_done


@inner
def _remove(left: Any, count: int, expert: int) -> int:
    """Take an expert out of the first `count`, which keep their order; how many are left."""
    place = 0
    while left[place] != expert:
        place += 1
    for later in range(place, count - 1):
        left[later] = left[later + 1]
    return count - 1
