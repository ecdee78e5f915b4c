"""How much of its experts' outputs a MoE step keeps: they are summed all at once, or group by group."""

from __future__ import annotations

import math

PAIR_BUFFER_NBYTES = 16 << 20
"""The MoE step keeps at most so many bytes of expert outputs, and computes one group after the other beyond."""

GROUP_NBYTES = PAIR_BUFFER_NBYTES // 4
"""Outputs of several experts that are computed at once then; they should stay in the caches until they are added."""


def groups_of(outputs: float) -> int:
    """Groups in which so many outputs, fp32 numbers, are computed; 1 where all are kept."""
    nbytes = 4 * outputs
    return 1 if nbytes <= PAIR_BUFFER_NBYTES else math.ceil(nbytes / GROUP_NBYTES)
