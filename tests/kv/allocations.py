"""What a step of decode allocates."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile


class Step(NamedTuple):
    """What a step allocated.

    Attributes:
        tensors: bytes of all tensors, one after the other.
        peak: bytes of arrays and objects at once, on all threads; the median of some steps, of which a few come upon
            more reads under way, or upon what another thread is about to give back.
        least: the least of them, when no two threads held most at the same time.
        most: the most of them, the first aside, which puts what is traced in the place of what steps keep.
    """

    tensors: int
    peak: int
    least: int
    most: int


def measured(step: Callable[[], object]) -> Step:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [one for one in found.profiler.kineto_results.events() if one.name() == "[memory]"]
    tensors = sum(max(0, one.nbytes()) for one in events)
    peaks = []
    # What a collection frees, and what it calls, is not the step's.
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(7):
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            step()
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
        gc.enable()
    return Step(tensors, int(median(peaks)), min(peaks), max(peaks[1:]))
