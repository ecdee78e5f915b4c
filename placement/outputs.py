"""How much of its experts' outputs a MoE step keeps: they are summed all at once, or group by group."""

from __future__ import annotations

import math

PAIR_BUFFER_NBYTES = 64 << 20
"""The MoE step keeps at most so many bytes of expert outputs, which experts give in any order, and computes one group
after the other beyond: a prompt of 1024 tokens with 8 experts each and 2048 channels."""

ACCELERATED_PAIR_BUFFER_NBYTES = 16 << 20
"""The same with an accelerator, where groups beyond cross its link while others are computed."""

GROUP_NBYTES = 4 << 20
"""Outputs of several experts that are computed at once then; they should stay in the caches until they are added."""


def kept_nbytes(*, accelerated: bool) -> int:
    """Bytes of outputs that a step keeps at most."""
    return ACCELERATED_PAIR_BUFFER_NBYTES if accelerated else PAIR_BUFFER_NBYTES


def groups_of(outputs: float, *, accelerated: bool) -> int:
    """Groups in which so many outputs, fp32 numbers, are computed; 1 where all are kept."""
    nbytes = 4 * outputs
    return 1 if nbytes <= kept_nbytes(accelerated=accelerated) else math.ceil(nbytes / GROUP_NBYTES)
