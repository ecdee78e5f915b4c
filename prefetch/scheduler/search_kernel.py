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
from prefetch.scheduler.greedy_kernel import earliest_completion
from prefetch.scheduler.split_kernel import best_split, split_near
from prefetch.scheduler.timeline_kernel import BOTH, ON_CPU, ON_DISK, ON_GPU, RAM, VRAM, run_timeline

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
def _neighbour(number: int, homes: Any, units: Any, trial: Any) -> bool:
    """`units` with one or two experts moved; False where `number` stands for nothing allowed."""
    count = len(homes)
    one, other = number // count, number % count
    trial[:] = units
    trial[one] = 1 - units[one]
    if other != one:
        if other < one:
            return False
        trial[other] = 1 - units[other]
    return not ((homes[one] == VRAM and trial[one] == ON_CPU) or (homes[other] == VRAM and trial[other] == ON_CPU))


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
    neighbours = len(loads) * len(loads) if len(loads) <= _FEW else 0
    last, number = CANDIDATES + neighbours, -1
    while number + 1 < last:
        number += 1
        if number < CANDIDATES:
            _candidate(number, loads, homes, costs, greedy_units, trial)
        elif not _neighbour((number - CANDIDATES) % neighbours, homes, units, trial):
            continue
        cpu, gpu = run_timeline(trial, loads, homes, costs, orders, counts, times)
        if max(cpu, gpu) < best:
            best = max(cpu, gpu)
            units[:] = trial
            if number >= CANDIDATES:
                # Until a whole round finds nothing better.
                last = number + neighbours
