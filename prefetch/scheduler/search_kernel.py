# mypy: allow-untyped-calls
"""The best mapping where a split alone may not be the best there is.

That is where experts come from disk, or the GPU takes longer for more tokens. All mappings are tried of a few experts;
of more, the greedy's, the static ones, splits, and of not many more their neighbours: never worse than any of these.
Experts are numbered by load, descending.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import inner
from prefetch.scheduler.greedy_kernel import cpu_expert_s, earliest_completion, gpu_expert_s
from prefetch.scheduler.split_kernel import best_split, split_near
from prefetch.scheduler.timeline_kernel import (
    BOTH,
    GPU_BEFORE,
    LINK,
    LINK_BEFORE,
    ON_CPU,
    ON_DISK,
    ON_GPU,
    RAM,
    VRAM,
    run_timeline,
)

CANDIDATES = 6
"""What `_candidate` numbers."""

_FEW = 10
"""Up to so many experts a single one decides: the best mapping's neighbours are tried too."""


@inner
def _candidate(number: int, loads: Any, homes: Any, costs: Any, greedy_units: Any, trial: Any) -> None:
    """Fill `trial` with a mapping to start from: static, the greedy's, with other numbers of copies, or a split."""
    copies, on_disk = 0, 0
    for expert in range(len(homes)):
        on_disk += homes[expert] == ON_DISK
        copies += homes[expert] >= RAM and greedy_units[expert] == ON_GPU
    if number < 2:
        for expert in range(len(homes)):
            trial[expert] = ON_GPU if homes[expert] <= BOTH else number
    elif number == 2:
        trial[:] = greedy_units
    elif number == 3 and on_disk == 0:
        best_split(loads, homes, costs, trial)
    else:
        split_near(homes, copies + number - 4, greedy_units, trial)


@inner
def _add_work(expert: int, unit: int, sign: float, loads: Any, homes: Any, costs: Any, work: Any) -> None:
    """Add an expert's seconds, times `sign`, to those of its unit and of the link; `work` is float64 [3]."""
    if unit == ON_CPU:
        work[0] += sign * cpu_expert_s(costs, loads[expert])
    else:
        work[1] += sign * gpu_expert_s(costs, loads[expert])
        if homes[expert] >= RAM:
            work[2] += sign * costs[LINK]


@inner
def _improve(best: float, loads: Any, homes: Any, costs: Any, units: Any, table: Any) -> None:
    """Move one expert or exchange two while that helps; where a unit's work alone takes too long, nothing is run."""
    orders, counts, times = table
    count = len(loads)
    trial, work, changed = np.empty(count, np.int64), np.zeros(3), np.empty(3)
    for expert in range(count):
        _add_work(expert, units[expert], 1.0, loads, homes, costs, work)
    number, unchanged = -1, 0
    while unchanged < count * count:
        unchanged += 1
        number = (number + 1) % (count * count)
        one, other = number // count, number % count
        if other < one or (other != one and units[one] == units[other]):
            continue
        if homes[one] == VRAM or homes[other] == VRAM:
            continue
        changed[:] = work
        for expert in range(one, other + 1, max(1, other - one)):
            _add_work(expert, units[expert], -1.0, loads, homes, costs, changed)
            _add_work(expert, 1 - units[expert], 1.0, loads, homes, costs, changed)
        if changed[0] >= best or costs[GPU_BEFORE] + changed[1] >= best or costs[LINK_BEFORE] + changed[2] >= best:
            continue
        trial[:] = units
        trial[one] = 1 - units[one]
        if other != one:
            trial[other] = 1 - units[other]
        cpu, gpu = run_timeline(trial, loads, homes, costs, orders, counts, times)
        if max(cpu, gpu) < best:
            best = max(cpu, gpu)
            units[:] = trial
            work[:] = changed
            # Until a whole round finds nothing better.
            unchanged = 0


@inner
def _from_bits(bits: int, homes: Any, trial: Any) -> bool:
    """The mapping whose bit e says that expert e is the GPU's; False where it is not allowed."""
    for expert in range(len(homes)):
        trial[expert] = (bits >> expert) & 1
        if trial[expert] == ON_CPU and homes[expert] == VRAM:
            return False
    return True


@inner
def search_all(loads: Any, homes: Any, costs: Any, units: Any, table: Any) -> None:
    """The best of all mappings of a few experts."""
    orders, counts, times = table
    trial = np.zeros(len(loads), np.int64)
    best = np.inf
    for bits in range(1 << len(loads)):
        if _from_bits(bits, homes, trial):
            cpu, gpu = run_timeline(trial, loads, homes, costs, orders, counts, times)
            if max(cpu, gpu) < best:
                best = max(cpu, gpu)
                units[:] = trial


@inner
def search(loads: Any, homes: Any, costs: Any, units: Any, table: Any) -> None:
    """Fill `units` with the best mapping found; no candidate named above is better.

    Args:
        loads: int64 [n], descending.
        homes: int64 [n].
        costs: float64 [10].
        units: int64 [n].
        table: orders, counts and times for `run_timeline`, overwritten.
    """
    orders, counts, times = table
    greedy_units, trial = np.zeros(len(loads), np.int64), np.zeros(len(loads), np.int64)
    earliest_completion(loads, homes, costs, greedy_units)
    best = np.inf
    for number in range(CANDIDATES):
        _candidate(number, loads, homes, costs, greedy_units, trial)
        cpu, gpu = run_timeline(trial, loads, homes, costs, orders, counts, times)
        if max(cpu, gpu) < best:
            best = max(cpu, gpu)
            units[:] = trial
    if len(loads) <= _FEW:
        _improve(best, loads, homes, costs, units, table)
