"""Which experts move to the accelerator between two steps."""

from __future__ import annotations

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
    """

    def __init__(self, accelerated: Accelerated, experts: int) -> None:
        self._accelerated = accelerated
        self._counts = np.zeros(experts)

    def note(self, keys: npt.NDArray[np.int64]) -> None:
        """What a step was routed to, each once."""
        self._counts *= DECAY
        self._counts[keys] += 1.0

    def promote(self, candidates: list[int], nbytes: int, step_s: float) -> int:
        """Begin to copy the best of some experts that are below.

        Args:
            candidates: experts that the last step found below.
            nbytes: of one.
            step_s: seconds of a step.

        Returns:
            How many are being copied.
        """
        tiers, link = self._accelerated.tiers, self._accelerated.accelerator.link
        above = tiers.above
        tiers.settle()
        slots = min(tier.table.usable_slots for tier in (above, tiers.below)) // _SHARE_OF_SLOTS
        # A slow link carries one at least, over some steps.
        carried = max(int(_SHARE_OF_LINK * step_s / link.copy_s(nbytes)), 1 if not tiers.held else 0)
        room = min(slots - tiers.held, carried)
        begun = 0
        for key in sorted(candidates, key=lambda key: -self._counts[key]):
            if begun >= room:
                break
            if not above.table.free_slots:
                victim = above.policy.victim(above.table.pinned)
                if victim is None or self._counts[key] < _GAIN * self._counts[victim] + 1.0:
                    break
            if not tiers.copy_ahead(key):
                break
            begun += 1
        return begun
