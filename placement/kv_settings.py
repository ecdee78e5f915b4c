"""How histories are cut."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_BLOCKS = 8
"""An accelerator's memory for blocks is cut into chunks of so many of the largest, each for blocks of one size."""

READS_IN_FLIGHT = 4
"""Reads of blocks from disk at the same time."""

READ_NBYTES = 9 << 18
"""What is read from disk at once, at most. A segment of int8 is a little more than 4 MiB: two pieces of about the same
size."""

SCORES_NBYTES = 32 << 20
"""Scores of a piece of attention by plain products on an accelerator, at most, unless those of one query are more;
there are some four tensors of this size at a time."""

PIECES_NBYTES = 5 * SCORES_NBYTES
"""Memory of an accelerator that attention to blocks elsewhere takes, with a segment's keys and values."""


@dataclass(frozen=True)
class KvSettings:
    """Sizes that a cache works with; outputs depend on them in their last bits, as on the order of a sum.

    Attributes:
        block_tokens: tokens of a block.
        segment_blocks: blocks that are attended in one piece, whatever tier they are in, and read in one go.
        recent_tokens: the newest tokens, which stay in the model's own dtype where older ones are packed.
        staging_segments: segments on their way from disk at once, at least 2.
        piece_blocks: blocks of a sequence that are written before those that are old enough are packed or may leave.
        few_tokens: passes of up to so many new tokens attend where the blocks lie; others, which reuse every key
            many times, through matrix products over a segment at a time.
    """

    block_tokens: int = 64
    segment_blocks: int = 64
    recent_tokens: int = 128
    staging_segments: int = 4
    piece_blocks: int = 4
    few_tokens: int = 8
