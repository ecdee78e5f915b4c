"""Which experts move to the accelerator between two steps."""

from __future__ import annotations

from itertools import islice

import numpy as np
import numpy.typing as npt

from offload.moe.tiered_step import Accelerated

DECAY = 0.97
"""Of an expert's count, by step: some thirty steps are remembered."""

_GAIN = 1.5
"""What comes must have been routed so many times as often as what goes: a copy that is regretted costs two."""

_SHARE_OF_LINK = 0.5
_SHARE_OF_SLOTS = 4
"""Copies on their way hold at most one slot in so many, of either tier."""


class Promotion:
    """Experts that are routed more often than some above take their slots.

    The count of an expert decays with every step (the idea of HybriMoE's scores, arXiv 2504.05897, section 4.4, with
    choices for scores). A step is one graph, so nothing can be copied for the layer that comes next; what is copied is
    there for steps to come, and copies run beside the next ones. As many are begun as the link carries in half a step.
    What goes is gone when the step begins, what comes is asked for while it runs.
    """

    def __init__(self, accelerated: Accelerated, experts: int) -> None:
        self._accelerated = accelerated
        self._counts = np.zeros(experts)
        self._chosen: list[int] = []

    def note(self, keys: npt.NDArray[np.int64]) -> None:
        """What a step was routed to, each once."""
        self._counts *= DECAY
        self._counts[keys] += 1.0

    def best_first(self, keys: npt.NDArray[np.int64]) -> list[int]:
        """Those that are routed to most come first."""
        best: list[int] = keys[np.argsort(-self._counts[keys], kind="stable")].tolist()
        return best

    def make_room(self, candidates: list[int], nbytes: int, step_s: float) -> None:
        """Between steps: choose the best of some experts that were below and still are, and free slots for them.

        Args:
            candidates: experts that a step found below, the best first.
            nbytes: of one.
            step_s: seconds of a step.
        """
        tiers, link = self._accelerated.tiers, self._accelerated.accelerator.link
        above = tiers.above
        tiers.settle()
        slots = min(tier.table.usable_slots for tier in (above, tiers.below)) // _SHARE_OF_SLOTS
        # A slow link carries one at least, over some steps.
        carried = max(int(_SHARE_OF_LINK * step_s / link.copy_s(nbytes)), 1 if not tiers.held else 0)
        room = min(slots - tiers.held, carried)
        chosen = list(islice(filter(tiers.can_be_copied, candidates), max(room, 0)))
        free = above.table.free_slots
        victims = above.policy.victims(above.table.pinned, max(len(chosen) - free, 0))
        worth_it = 0
        for key, victim in zip(chosen[free:], victims, strict=False):
            if self._counts[key] < _GAIN * self._counts[victim] + 1.0:
                break
            worth_it += 1
        for victim in victims[:worth_it]:
            above.evict(victim)
        self._chosen = chosen[: free + worth_it]

    def begin(self) -> None:
        """Beside a step, which reads no slot that is free: begin to copy what was chosen."""
        chosen, self._chosen = self._chosen, []
        tiers = self._accelerated.tiers
        idle = list(filter(tiers.can_be_copied, chosen))
        tiers.copy_all_ahead(idle[: tiers.above.table.free_slots])
