# mypy: allow-untyped-calls
"""From an unsorted layer to its mapping, executed: the one entry of the scheduler's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import entry, inner
from prefetch.scheduler.equal_kernel import best_of_equals
from prefetch.scheduler.greedy_kernel import earliest_completion
from prefetch.scheduler.search_kernel import search
from prefetch.scheduler.split_kernel import best_split
from prefetch.scheduler.timeline_kernel import (
    BOTH,
    GPU_EXPERT,
    GPU_TOKEN,
    ON_CPU,
    ON_DISK,
    ORDERS,
    copy_into,
    run_timeline,
)

MOST_EQUAL = 12
"""Up to so many experts of equal load the best mapping is looked for among all pairs of numbers."""


@inner
def _by_load(loads: Any) -> Any:
    """Experts by load, descending; stable."""
    order = np.empty(len(loads), np.int64)
    for expert in range(len(loads)):
        place = expert
        while place > 0 and loads[order[place - 1]] < loads[expert]:
            order[place] = order[place - 1]
            place -= 1
        order[place] = expert
    return order


# What `choose` is asked for.
BEST, GREEDY, GIVEN = range(3)


# Rows of the table that `choose` fills, beyond the orders.
UNITS, COUNTS, ROWS = ORDERS, ORDERS + 1, ORDERS + 2


@entry("UniTuple(float64, 2)(int64, int64[::1], int64[::1], float64[::1], int64[:, ::1], float64[:, ::1])")
def choose(what: int, loads: Any, homes: Any, costs: Any, orders: Any, times: Any) -> Any:
    """Map experts to units and execute the mapping; experts in any order.

    Args:
        what: BEST of what is found, GREEDY for earliest completion alone, GIVEN for `units` as they are.
        loads: int64 [n].
        homes: int64 [n].
        costs: float64 [10].
        orders: int64 [ROWS, n or ORDERS, whichever is more]; the orders of `run_timeline`, then the units, read where
            GIVEN, then how many entries of each order count.
        times: float64 [2, n].

    Returns:
        When the CPU and the GPU are done; NaN twice where an expert is on a GPU that is not there.
    """
    count = len(loads)
    units, counts = orders[UNITS], orders[COUNTS]
    order = _by_load(loads)
    sorted_loads, sorted_homes, mapping = loads[order], homes[order], np.zeros(count, np.int64)
    on_disk, equal = False, True
    for expert in range(count):
        on_disk |= homes[expert] == ON_DISK
        equal &= loads[expert] == loads[0]
        if homes[expert] <= BOTH and costs[GPU_EXPERT] == np.inf:
            return np.nan, np.nan
    table = (orders, counts, times)
    if what == GIVEN:
        for expert in range(count):
            mapping[expert] = units[order[expert]]
    elif costs[GPU_EXPERT] == np.inf:
        mapping[:] = ON_CPU
    elif what == GREEDY:
        earliest_completion(sorted_loads, sorted_homes, costs, mapping)
    elif (costs[GPU_TOKEN] == 0 or equal) and not on_disk:
        best_split(sorted_loads, sorted_homes, costs, mapping)
    elif equal and count <= MOST_EQUAL:
        best_of_equals(sorted_loads, sorted_homes, costs, mapping)
    elif count > 0:
        search(sorted_loads, sorted_homes, costs, mapping, table)
    cpu, gpu = run_timeline(mapping, sorted_loads, sorted_homes, costs, orders, counts, times)
    for row in range(ORDERS):
        for index in range(counts[row]):
            orders[row, index] = order[orders[row, index]]
    copy_into(times[0], times[1])
    for expert in range(count):
        units[order[expert]] = mapping[expert]
        times[1, order[expert]] = times[0, expert]
    return cpu, gpu
