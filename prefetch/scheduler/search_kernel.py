# mypy: allow-untyped-calls
"""The best mapping where a split alone may not be the best there is.

That is where experts come from disk, or the GPU takes longer for more tokens. The greedy's mapping, the static ones and
of many experts splits are tried; of not too many a beam search looks for a better one: never worse than any of these.
Experts are numbered by load, descending.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import inner
from prefetch.scheduler.beam_kernel import beam
from prefetch.scheduler.greedy_kernel import earliest_completion
from prefetch.scheduler.split_kernel import best_split, split_near
from prefetch.scheduler.timeline_kernel import BOTH, ON_DISK, ON_GPU, RAM, copy_into, run_timeline

CANDIDATES, _FIRST_SPLIT = 6, 3
"""What `_candidate` numbers; from the second on, splits."""

_FEW, _WIDTH_OF_FEW = 12, 16
"""Up to so many experts a single one decides; so many partial mappings are nearly always all that matter."""

_MORE, _WIDTH_OF_MORE = 24, 4
"""What there is time for. Beyond, one expert more or less on either side makes little difference."""


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
        copy_into(trial, greedy_units)
    elif number == 3 and on_disk == 0:
        best_split(loads, homes, costs, trial)
    else:
        split_near(homes, copies + number - 4, greedy_units, trial)


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
    few = len(loads) <= _FEW
    for number in range(_FIRST_SPLIT if few else CANDIDATES):
        _candidate(number, loads, homes, costs, greedy_units, trial)
        cpu, gpu = run_timeline(trial, loads, homes, costs, orders, counts, times)
        if max(cpu, gpu) < best:
            best = max(cpu, gpu)
            copy_into(units, trial)
    if len(loads) <= _MORE:
        beam(loads, homes, costs, _WIDTH_OF_FEW if few else _WIDTH_OF_MORE, best, units)
