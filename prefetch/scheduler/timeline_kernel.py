# mypy: allow-untyped-calls
"""When everything happens, once it is decided what computes each expert.

Each resource serves in the order in which things are ready for it, which is best for its own finish. Of those that
are ready together the one with more tokens goes first: what remains to be done with it elsewhere takes longer. With
reads or copies that all take equally long this is Johnson's rule for two machines in a row (Johnson 1954).
"""

from __future__ import annotations

from typing import Any

from prefetch.jit import inner

# The order of `LayerCosts.as_array`.
CPU_TOKEN, CPU_EXPERT, CPU_FIRST, GPU_EXPERT, GPU_TOKEN, GPU_BEFORE, LINK, DISK, LINK_BEFORE, DISK_BEFORE = range(10)

# The values of `Home` and `Unit`.
VRAM, BOTH, RAM, ON_DISK = range(4)
ON_CPU, ON_GPU = range(2)

# Rows of the orders that `run_timeline` writes.
CPU_ORDER, GPU_ORDER, TRANSFERS, READS, ORDERS = range(5)


@inner
def copy_into(target: Any, source: Any) -> None:
    """All elements of an array to another of one dimension and at least that length."""
    for index in range(len(source)):
        target[index] = source[index]


@inner
def sort_by(order: Any, count: int, ready: Any) -> None:
    """Sort the first `count` places by ready time, then by number: an insertion sort, as they are nearly sorted."""
    for index in range(1, count):
        expert = order[index]
        time, place = ready[expert], index
        while place > 0 and (
            ready[order[place - 1]] > time or (ready[order[place - 1]] == time and order[place - 1] > expert)
        ):
            order[place] = order[place - 1]
            place -= 1
        order[place] = expert


@inner
def pick(order: Any, count: int, units: Any, unit: int, homes: Any, nearest: int, furthest: int) -> int:
    """Append experts of `unit` (any for -1) whose home is between `nearest` and `furthest` to `count` others."""
    for expert in range(len(homes)):
        if nearest <= homes[expert] <= furthest and (unit < 0 or units[expert] == unit):
            order[count] = expert
            count += 1
    return count


@inner
def run_timeline(units: Any, loads: Any, homes: Any, costs: Any, orders: Any, counts: Any, times: Any) -> Any:
    """Execute a mapping of experts that are numbered by load, descending.

    Args:
        units: int64 [n], the unit of each expert.
        loads: int64 [n], tokens of each.
        homes: int64 [n].
        costs: float64 [10].
        orders: int64 [ORDERS, n]; filled.
        counts: int64 [ORDERS], how many entries of each order count; filled.
        times: float64 [2, n]; row 0 is scratch, row 1 is when each expert is done; filled.

    Returns:
        When the CPU and the GPU are done.
    """
    ready, done = times[0], times[1]
    ready[:] = 0.0
    counts[READS] = pick(orders[READS], 0, units, -1, homes, ON_DISK, ON_DISK)
    clock = costs[DISK_BEFORE]
    for expert in orders[READS, : counts[READS]]:
        clock += costs[DISK]
        ready[expert] = clock
    # What is read comes after what is there, so that little is left to sort.
    count = pick(orders[TRANSFERS], 0, units, ON_GPU, homes, RAM, RAM)
    counts[TRANSFERS] = pick(orders[TRANSFERS], count, units, ON_GPU, homes, ON_DISK, ON_DISK)
    sort_by(orders[TRANSFERS], counts[TRANSFERS], ready)
    clock = costs[LINK_BEFORE]
    for expert in orders[TRANSFERS, : counts[TRANSFERS]]:
        clock = max(clock, ready[expert]) + costs[LINK]
        ready[expert] = clock
    count = pick(orders[GPU_ORDER], 0, units, ON_GPU, homes, VRAM, BOTH)
    for index in range(counts[TRANSFERS]):
        orders[GPU_ORDER, count + index] = orders[TRANSFERS, index]
    counts[GPU_ORDER] = count + counts[TRANSFERS]
    sort_by(orders[GPU_ORDER], counts[GPU_ORDER], ready)
    gpu = costs[GPU_BEFORE]
    for expert in orders[GPU_ORDER, : counts[GPU_ORDER]]:
        gpu = max(gpu, ready[expert]) + costs[GPU_EXPERT] + costs[GPU_TOKEN] * loads[expert]
        done[expert] = gpu
    count = pick(orders[CPU_ORDER], 0, units, ON_CPU, homes, VRAM, RAM)
    counts[CPU_ORDER] = pick(orders[CPU_ORDER], count, units, ON_CPU, homes, ON_DISK, ON_DISK)
    sort_by(orders[CPU_ORDER], counts[CPU_ORDER], ready)
    cpu = 0.0
    for index in range(counts[CPU_ORDER]):
        expert = orders[CPU_ORDER, index]
        first = costs[CPU_FIRST] if index == 0 else 0.0
        cpu = max(cpu, ready[expert]) + costs[CPU_EXPERT] + costs[CPU_TOKEN] * loads[expert] + first
        done[expert] = cpu
    return cpu, gpu
