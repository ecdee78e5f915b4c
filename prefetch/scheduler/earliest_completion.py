"""What is copied is what makes a layer end earliest."""

from __future__ import annotations

from collections.abc import Sequence

from prefetch.scheduler.base import StepScheduler
from prefetch.scheduler.records import Home, LayerCosts
from prefetch.scheduler.scheduler import LayerScheduler


class EarliestCompletion(StepScheduler):
    """Experts as they come, and the copies of `LayerScheduler`'s best mapping."""

    def copies(self, loads: Sequence[int], homes: Sequence[Home], costs: LayerCosts) -> list[int]:
        """Those that the mapping transfers."""
        transfers: list[int] = LayerScheduler(costs).schedule(loads, homes).transfers.tolist()
        return transfers
