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
def _is_sooner(finish: float, load: int, best: int, best_finish: float, loads: Any) -> bool:
    """More tokens win a tie, then the lower number."""
    return bool(best < 0 or finish < best_finish or (finish == best_finish and load > loads[best]))


@inner
def _place_of_fewest(queue: Any, begin: int, end: int, loads: Any) -> int:
    """Where in queue[begin:end], of descending loads and not empty, the first of the fewest tokens stands."""
    place = end - 1
    while place > begin and loads[queue[place - 1]] == loads[queue[place]]:
        place -= 1
    return place


@inner
def _remove(queue: Any, place: int, end: int) -> int:
    """Take the entry at `place` out of queue[:end], which keeps its order; the new end."""
    for later in range(place, end - 1):
        queue[later] = queue[later + 1]
    return end - 1


@inner
def earliest_completion(loads: Any, homes: Any, costs: Any, units: Any) -> None:
    """Fill `units` by HybriMoE's greedy; ties go to the CPU, then to the GPU.

    Experts wait in queues by where they are: in one all are ready together, so that it has one candidate at each end.
    """
    count = len(loads)
    queues, ready = np.empty((4, count), np.int64), np.zeros(count)
    in_ram, to_read, cached, copied = queues[0], queues[1], queues[2], queues[3]
    ram_begin, ram_end, reads, cached_begin, cached_end, copies = 0, 0, 0, 0, 0, 0
    clock = costs[DISK_BEFORE]
    for expert in range(count):
        if homes[expert] == ON_DISK:
            clock += costs[DISK]
            ready[expert] = clock
            to_read[reads] = expert
            reads += 1
        elif homes[expert] == RAM:
            in_ram[ram_end] = expert
            ram_end += 1
        else:
            cached[cached_end] = expert
            cached_end += 1
    cpu, gpu, link = 0.0, costs[GPU_BEFORE], costs[LINK_BEFORE]
    first = costs[CPU_FIRST]
    # The GPU takes the fewest tokens first where they cost it anything, else the most.
    fewest = costs[GPU_TOKEN] > 0
    left = count
    while left > 0:
        on_cpu, cpu_place, cpu_done = -1, 0, np.inf
        on_gpu, gpu_place, gpu_done = -1, 0, np.inf
        to_copy, copy_done = -1, np.inf
        if ram_begin < ram_end:
            cpu_place = _place_of_fewest(in_ram, ram_begin, ram_end, loads)
            on_cpu = in_ram[cpu_place]
            cpu_done = cpu + cpu_expert_s(costs, loads[on_cpu])
            to_copy, copy_done = in_ram[ram_begin], link + costs[LINK]
        for place in range(reads):
            expert = to_read[place]
            done = max(cpu, ready[expert]) + cpu_expert_s(costs, loads[expert])
            if done < cpu_done or (done == cpu_done and expert < on_cpu):
                on_cpu, cpu_place, cpu_done = expert, place, done
        if reads > 0:
            # Those that are read later are ready later and have fewer tokens.
            expert = to_read[0]
            done = max(link, ready[expert]) + costs[LINK]
            tied = done == copy_done and loads[expert] == loads[to_copy] and expert < to_copy
            if _is_sooner(done, loads[expert], to_copy, copy_done, loads) or tied:
                to_copy, copy_done = expert, done
        if cached_begin < cached_end:
            gpu_place = _place_of_fewest(cached, cached_begin, cached_end, loads) if fewest else cached_begin
            on_gpu = cached[gpu_place]
            gpu_done = gpu + gpu_expert_s(costs, loads[on_gpu])
        from_copied = False
        for place in range(copies):
            expert = copied[place]
            done = max(gpu, ready[expert]) + gpu_expert_s(costs, loads[expert])
            tied = done == gpu_done and loads[expert] == loads[on_gpu] and expert < on_gpu
            if _is_sooner(done, loads[expert], on_gpu, gpu_done, loads) or tied:
                on_gpu, gpu_place, gpu_done, from_copied = expert, place, done, True
        helps = False
        if on_cpu < 0:
            # Nothing uncached is left: the CPU helps with the cached expert of the fewest tokens. What was copied in
            # this layer is the GPU's.
            for place in range(cached_begin, cached_end):
                expert = cached[place]
                if homes[expert] == BOTH and (on_cpu < 0 or loads[expert] < loads[on_cpu]):
                    on_cpu, cpu_place, helps = expert, place, True
            if helps:
                cpu_done = cpu + cpu_expert_s(costs, loads[on_cpu])
        cpu_done += first
        if on_cpu >= 0 and cpu_done <= gpu_done and cpu_done <= copy_done:
            units[on_cpu], cpu, first = ON_CPU, cpu_done, 0.0
            left -= 1
            if helps:
                cached_end = _remove(cached, cpu_place, cached_end)
            elif homes[on_cpu] == ON_DISK:
                reads = _remove(to_read, cpu_place, reads)
            else:
                ram_end = _remove(in_ram, cpu_place, ram_end)
        elif on_gpu >= 0 and gpu_done <= copy_done:
            units[on_gpu], gpu = ON_GPU, gpu_done
            left -= 1
            if from_copied:
                copies = _remove(copied, gpu_place, copies)
            elif gpu_place == cached_begin:
                cached_begin += 1
            else:
                cached_end = _remove(cached, gpu_place, cached_end)
        else:
            ready[to_copy], link = copy_done, copy_done
            if homes[to_copy] == ON_DISK:
                reads = _remove(to_read, 0, reads)
            else:
                ram_begin += 1
            copied[copies] = to_copy
            copies += 1
