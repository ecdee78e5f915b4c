"""The interface that every scheduler of MoE steps has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from prefetch.scheduler.records import Home, LayerCosts


class StepScheduler(ABC):
    """Decides in which order a layer's experts are computed and which are copied to an accelerator. Never the output.

    Calls come from one thread at a time.

    Attributes:
        as_they_come: whether experts in host memory are computed as they are there, while others are read. Otherwise in
            ascending order of their numbers, each waited for in turn.
    """

    as_they_come: bool = True

    @abstractmethod
    def copies(self, loads: Sequence[int], homes: Sequence[Home], costs: LayerCosts) -> Sequence[int]:
        """Which experts to copy to the accelerator before they are computed there; the CPU computes the others.

        Asked in a step with an accelerator that has not all of the layer's experts. What is named is copied as far as
        slots can be spared.

        Args:
            loads: tokens of each active expert, 1 or more.
            homes: where each is, none in BOTH.
            costs: seconds of the layer's experts.

        Returns:
            Places in `loads`, of experts whose home is RAM or DISK.
        """
