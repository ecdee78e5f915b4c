# mypy: allow-untyped-calls
"""Every number of uncached experts to copy to the GPU and of cached ones to leave to the CPU.

With costs that are constant on the GPU and linear in tokens on the CPU no other mapping of experts in memory is better:
the GPU's finish depends on how many experts it gets, the CPU's on the tokens that stay, so the experts with the most
tokens move. Both static mappings are among these. Experts are numbered by load, descending.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import inner
from prefetch.scheduler.greedy_kernel import ascending, cpu_expert_s, gpu_expert_s
from prefetch.scheduler.timeline_kernel import (
    BOTH,
    CPU_FIRST,
    GPU_BEFORE,
    LINK,
    LINK_BEFORE,
    ON_CPU,
    ON_DISK,
    ON_GPU,
    RAM,
    copy_into,
)


@inner
def best_split(loads: Any, homes: Any, costs: Any, units: Any) -> None:
    """Fill `units` with the best numbers of copied and of left experts; none is on disk."""
    uncached = ascending(homes, RAM, RAM)
    movable = ascending(homes, BOTH, BOTH)
    uncached_s, all_gpu_s = 0.0, costs[GPU_BEFORE]
    for expert in uncached:
        uncached_s += cpu_expert_s(costs, loads[expert])
    for expert in range(len(loads)):
        if homes[expert] <= BOTH:
            all_gpu_s += gpu_expert_s(costs, loads[expert])
    best, best_copies, best_left = np.inf, 0, 0
    copied_gpu_s, after_link, copied_cpu_s = 0.0, 0.0, 0.0
    for copies in range(len(uncached) + 1):
        if copies > 0:
            load = loads[uncached[len(uncached) - copies]]
            copied_cpu_s += cpu_expert_s(costs, load)
            copied_gpu_s += gpu_expert_s(costs, load)
            after_link = max(after_link, costs[LINK_BEFORE] + copies * costs[LINK]) + gpu_expert_s(costs, load)
        left_cpu_s, left_gpu_s = 0.0, 0.0
        for left in range(len(movable) + 1):
            if left > 0:
                left_cpu_s += cpu_expert_s(costs, loads[movable[left - 1]])
                left_gpu_s += gpu_expert_s(costs, loads[movable[left - 1]])
            cpu = uncached_s - copied_cpu_s + left_cpu_s
            if left > 0 or copies < len(uncached):
                cpu += costs[CPU_FIRST]
            makespan = max(cpu, max(all_gpu_s - left_gpu_s + copied_gpu_s, after_link))
            if makespan < best:
                best, best_copies, best_left = makespan, copies, left
    for expert in range(len(loads)):
        units[expert] = ON_GPU if homes[expert] <= BOTH else ON_CPU
    for index in range(best_copies):
        units[uncached[len(uncached) - 1 - index]] = ON_GPU
    for index in range(best_left):
        units[movable[index]] = ON_CPU


@inner
def split_near(homes: Any, copies: int, like: Any, units: Any) -> None:
    """`like` with exactly `copies` of the uncached experts on the GPU, those of the most tokens."""
    uncached = ascending(homes, RAM, ON_DISK)
    copy_into(units, like)
    for index in range(len(uncached)):
        units[uncached[len(uncached) - 1 - index]] = ON_GPU if index < copies else ON_CPU
