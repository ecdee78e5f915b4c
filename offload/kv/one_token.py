"""Attention of one new token of one sequence to a table whose blocks are where they were for the token before.

Nearly every token is such a one. What attention has to find out about a table, which costs more than attention to a few
thousand tokens, is kept until a block of any table comes, goes or moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.merge_parts import merge_parts
from cpu_kernels.prepared_attention import PreparedAttention, rows_elements
from offload.devices.host_threads import kernel_pool
from offload.kv.stream import read_ahead, segments, tiers_of

if TYPE_CHECKING:
    from offload.kv.table import BlockTable

Int64 = npt.NDArray[np.int64]


class OneToken:
    """What is kept of a table."""

    def __init__(self, table: BlockTable, heads: int, scale: float) -> None:
        """Look at a table of one sequence; `all_below` says whether it can be used. The caller holds the pool's lock.

        Args:
            table: with the new token.
            heads: of queries.
            scale: of the scores.
        """
        cut, size = segments(table, table.columns), table.settings.block_tokens
        self._form = heads, scale
        self._state = _state(table)
        self._blocks = table.blocks(0, 0, table.columns).copy()
        self.all_below = bool(tiers_of(table, cut).below.all())
        self._parts: list[PreparedAttention] = []
        if not self.all_below:
            return
        rows, self._out, self._lse = _scratch(table, len(cut), heads)
        # Growing it makes what others keep worthless.
        self._state = _state(table)
        firsts = np.array([segment.first for segment in cut])
        ends = np.array([segment.end for segment in cut])
        lengths = np.minimum(ends * size, table.tokens) - firsts * size
        packed = sum(segment.layout is not table.layouts.plain for segment in cut)
        for first, last in (0, packed), (packed, len(cut)):
            if first < last:
                start = firsts[first]
                addresses = table.pool.addresses[self._blocks[start : ends[last - 1]]]
                offsets = np.append(firsts[first:last], ends[last - 1]) - start
                self._parts.append(
                    PreparedAttention(
                        cut[first].layout, scale, offsets, addresses, lengths[first:last], firsts[first:last] * size,
                        rows, self._out[0, first:last], self._lse[0, first:last],
                    )
                )  # fmt: skip
        self._last_first = int(firsts[-1]) * size

    def is_of(self, table: BlockTable, heads: int, scale: float) -> bool:
        """Whether all of it still holds."""
        return (
            self._state == _state(table)
            and self._form == (heads, scale)
            and np.array_equal(self._blocks, table.blocks(0, 0, table.columns))
        )

    def attend(self, table: BlockTable, query: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        """Fp32 [1, Hq, 1, V] of a query [1, Hq, 1, D]."""
        pool, position = kernel_pool(), table.tokens - 1
        for part in self._parts[:-1]:
            # Its last block is full.
            part.attend(query, part.last_length, position, pool)
        self._parts[-1].attend(query, table.tokens - self._last_first, position, pool)
        return merge_parts(self._out, self._lse, sinks, pool)


def _scratch(table: BlockTable, lists: int, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory that all tables share, as one after the other attends: rows of queries, out [1, lists, Hq, 1, V], lse."""
    width = table.layouts.plain.output_width
    sizes = rows_elements(table.layouts.plain, lists, heads), lists * heads * width, lists * heads
    rows, out, lse = table.pool.scratch(sum(sizes)).split([*sizes])
    return rows, out.view(1, lists, heads, 1, width), lse.view(1, lists, heads, 1)


def _state(table: BlockTable) -> tuple[int, int, int]:
    return table.pool.records.version, table.sealed, table.columns


def attend_one(table: BlockTable, query: torch.Tensor, scale: float, sinks: torch.Tensor | None) -> torch.Tensor | None:
    """Attention of the last token of a table's one sequence; None where some of the blocks are not in host memory.

    Args:
        table: the history; the caller holds its pool's lock.
        query: [1, Hq, 1, D], contiguous.
        scale: of the scores.
        sinks: [Hq] or None.
    """
    heads, known = query.shape[1], table.one_token
    if known is None or not known.is_of(table, heads, scale):
        known = table.one_token = OneToken(table, heads, scale)
    if not known.all_below:
        return None
    out = known.attend(table, query, sinks)
    pool = table.pool
    if pool.staging.is_busy:
        # For another table, or this one before it changed.
        pool.staging.drop_all()
    if pool.below.blocks_written and table.follower is not None:
        read_ahead(table.follower(), pool)
    return out
