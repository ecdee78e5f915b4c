"""Copying experts to an accelerator one layer ahead, as far as it gains more than it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from offload.moe.layer import ExpertsLayer
from offload.moe.tiered_step import Accelerated
from offload.tiers.slot_table import SlotState
from prefetch.impact import best_copy, loss_s
from prefetch.policies.geometry import Geometry
from prefetch.scheduler.records import Floats, Home, Ints, LayerCosts
from prefetch.scheduler.scheduler import LayerScheduler

LEAST_PROBABILITY = 0.3
"""What is less probable is not copied ahead."""

_SHARE_OF_SLOTS = 4
"""Copies ahead hold at most one slot in so many, of either tier."""


class CopyAhead:
    """HybriMoE's impact-driven prefetching (arXiv 2504.05897, section 4.3), from RAM to the accelerator.

    What the next layer probably needs is scheduled with and without the expert above: the seconds that its being there
    saves, times its probability, is the gain. The loss is what one miss costs times how probably the victim is needed.
    What would not arrive before its layer is left. Called under the runtime's step lock.
    """

    def __init__(
        self,
        accelerated: Accelerated,
        layers: Sequence[ExpertsLayer],
        geometry: Geometry,
        schedule: Callable[[LayerCosts], LayerScheduler] = LayerScheduler,
    ) -> None:
        """Copies into an accelerator's tier; `schedule` is how a layer to come, of some costs, is taken to run."""
        self._schedule = schedule
        self.tiers = accelerated.tiers
        self._costs = accelerated.costs
        self._geometry = geometry
        self._nbytes = [layer.layout.nbytes for layer in layers]
        self._first_keys = geometry.first_keys.tolist()

    def copy(self, layer: int, probabilities: Floats, layer_s: float) -> None:
        """Copy what gains most, one after the other.

        Args:
            layer: the one that is meant, the next to come.
            probabilities: float64 [its experts], how probably each is needed.
            layer_s: seconds until it comes; 0 where that is not known.
        """
        first = self._first_keys[layer]
        likely: Ints = np.flatnonzero(probabilities >= LEAST_PROBABILITY)
        homes = self._homes(first, likely)
        costs = self._costs.of_layer(self._nbytes[layer])
        scheduler = self._schedule(costs)
        # What the step needs now goes first.
        ready_s = (self.tiers.above.loading + 1) * costs.link_expert_s
        while self._room > 0 and (ready_s <= layer_s or layer_s == 0):
            place, gain_s = best_copy(scheduler, np.ones(len(likely), np.int64), homes, probabilities[likely])
            if place < 0:
                return
            key = first + int(likely[place])
            if gain_s <= self._loss_s(key, float(probabilities[likely[place]]), scheduler):
                return
            if not self.tiers.copy_ahead(key):
                return
            homes[place] = Home.BOTH
            ready_s += costs.link_expert_s

    def end_layer(self, layer: int) -> None:
        """The layer has come: what of it is still on its way is of no use."""
        above = self.tiers.above
        if above.reading_ahead:
            first, end = self._first_keys[layer], self._first_keys[layer + 1]
            above.cancel_ahead([key for key in above.reading_ahead if first <= key < end])

    @property
    def _room(self) -> int:
        """Copies that may still be begun."""
        fewest = min(tier.table.usable_slots for tier in (self.tiers.above, self.tiers.below))
        self.tiers.settle()
        return fewest // _SHARE_OF_SLOTS - self.tiers.held

    def _homes(self, first: int, likely: Ints) -> Ints:
        above, below = self.tiers.above.table, self.tiers.below.table
        homes = [
            Home.VRAM if above.slot_of(first + expert) is not None
            else Home.RAM if below.state_of(first + expert) is SlotState.READY
            else Home.DISK
            for expert in likely.tolist()
        ]  # fmt: skip
        return np.array(homes, np.int64)

    def _loss_s(self, key: int, probability: float, scheduler: LayerScheduler) -> float:
        """Of what would make room; 0 where there is a free slot, infinite where none can be had."""
        above = self.tiers.above
        if above.table.free_slots:
            return 0.0
        victim = above.policy.victim(above.table.pinned)
        return float("inf") if victim is None else loss_s(scheduler, above.policy, victim, key, probability)
