"""Nothing is scheduled."""

from __future__ import annotations

from collections.abc import Sequence

from prefetch.scheduler.base import StepScheduler
from prefetch.scheduler.records import Home, LayerCosts


class StaticOrder(StepScheduler):
    """Experts in ascending order, and no copies: what an accelerator has not, the CPU computes."""

    as_they_come = False

    def copies(self, loads: Sequence[int], homes: Sequence[Home], costs: LayerCosts) -> tuple[int, ...]:
        """None."""
        return ()
