"""Attention of a few new tokens to a table whose blocks are where they were for the step before.

Nearly every step of decode is such a one. What attention has to find out about a table, which costs more than attention
to a few thousand tokens, is kept until a block of any table comes, goes or moves, and so is the memory that attention
writes to: a step allocates nothing that grows with the history.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.merge_parts import merge_parts
from cpu_kernels.prepared_attention import PreparedAttention, rows_elements
from offload.devices.base import AttentionBatch
from offload.devices.host_attention import attend
from offload.devices.host_threads import kernel_pool
from offload.kv.stream import ColdUnits, Segment, Stream, Unit, read_ahead, segments, tiers_of, units_of

if TYPE_CHECKING:
    from offload.kv.table import BlockTable

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]


class FewTokens:
    """What is kept of a table.

    A segment of a sequence is a list of blocks; lists are numbered segment after segment, those of all sequences in
    turn. Those in memory are prepared; others, which come to another place with every step, are attended as they come.

    Attributes:
        is_below: whether all blocks are in host memory or on disk, without which nothing is kept.
        cold: lists that have to be read.
    """

    def __init__(self, table: BlockTable, heads: int, new: int, scale: float) -> None:
        """Look at a table. The caller holds the pool's lock.

        Args:
            table: with the new tokens.
            heads: of queries.
            new: tokens of each sequence.
            scale: of the scores.
        """
        cut, rows = segments(table, table.columns), table.sequences
        tiers = tiers_of(table, cut)
        self._form = heads, new, scale
        self._version = table.version
        self.is_below = not bool(table.pool.is_above[table.all_blocks(table.columns)].any())
        self.cold = ColdUnits(table.pool, [])
        self._parts: list[PreparedAttention] = []
        self._some: torch.Tensor | None = None
        if not self.is_below:
            return
        self._cut, self._rows = cut, rows
        scratch, self._out, self._lse = _scratch(table, len(cut) * rows, heads, new)
        # Growing it makes what others keep worthless.
        self._version = table.version
        # Segment after segment, so that sequences that share one come next to each other.
        self.cold = ColdUnits(table.pool, sorted(units_of(table, cut, tiers.apart)))
        self._last_is_here = tiers.below[:, -1].astype(np.int64)
        packed = sum(segment.layout is not table.layouts.plain for segment in cut)
        for first, last in (0, packed), (packed, len(cut)):
            here = tiers.below[:, first:last]
            if here.any():
                self._parts.append(self._prepare(table, scratch, first, last, here))

    def _prepare(
        self, table: BlockTable, scratch: torch.Tensor, first: int, last: int, here: Bool
    ) -> PreparedAttention:
        """The lists of segments of one layout, those that are not `here` [sequences, segments] without tokens."""
        cut, size, rows = self._cut[first:last], table.settings.block_tokens, self._rows
        counts = np.array([segment.end - segment.first for segment in cut])
        starts = np.array([segment.first for segment in cut]) * size
        lengths = np.minimum(starts + counts * size, table.tokens) - starts
        blocks = [table.blocks(row, segment.first, segment.end) for segment in cut for row in range(rows)]
        own = slice(first * rows, last * rows)
        return PreparedAttention(
            cut[0].layout, self._form[2], np.append(0, np.cumsum(np.repeat(counts, rows))),
            table.pool.addresses[np.concatenate(blocks)], (lengths[:, None] * here.T).reshape(-1),
            np.repeat(starts, rows), scratch, self._out[own], self._lse[own], rows,
        )  # fmt: skip

    def is_of(self, table: BlockTable, heads: int, new: int, scale: float) -> bool:
        """Whether all of it still holds."""
        return self.is_current(table) and self._form == (heads, new, scale)

    def is_current(self, table: BlockTable) -> bool:
        """Whether the table's blocks are where they were."""
        return self._version == table.version

    def attend(self, table: BlockTable, query: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        """Fp32 [B, Hq, T, V] of a query [B, Hq, T, D].

        Raises:
            StorageError, StoreCorruptError: a block cannot be read.
        """
        pool, position, last = kernel_pool(), table.tokens - 1, self._cut[-1]
        # What has to be read is, while the rest is attended.
        stream = Stream(table, self.cold) if self.cold.units else None
        # Those that are read are written to where these leave nothing.
        for part in self._parts:
            lengths: Int64 = part.last_lengths
            if part is self._parts[-1] and self._last_is_here.any():
                lengths = self._last_is_here * (table.tokens - last.first * table.settings.block_tokens)
            part.attend(query, lengths, position, pool)
        if stream is not None:
            self._attend_cold(table, query, stream)
        heads, new, _ = self._form
        shape = len(self._cut), self._rows, heads, new
        return merge_parts(
            self._out.view(*shape, -1).transpose(0, 1), self._lse.view(shape).transpose(0, 1), sinks, pool
        )

    def _attend_cold(self, table: BlockTable, query: torch.Tensor, stream: Stream) -> None:
        units = self.cold.units
        # Half of what is read ahead, so that reads go on meanwhile.
        most, done = max(1, table.settings.staging_segments // 2), 0
        while done < len(units):
            with stream.take_some(self._alike(units[done : done + most])) as (taken, addresses):
                self._attend_some(table, query, taken, addresses)
            done += len(taken)
        stream.look_ahead()

    def _alike(self, units: list[Unit]) -> int:
        """How many of some units follow each other and are of one layout."""
        first, layout = self._number(units[0]), self._cut[units[0].segment].layout
        count = 1
        while (
            count < len(units)
            and self._number(units[count]) == first + count
            and self._cut[units[count].segment].layout is layout
        ):
            count += 1
        return count

    def _number(self, unit: Unit) -> int:
        return unit.segment * self._rows + unit.row

    def _attend_some(self, table: BlockTable, query: torch.Tensor, units: list[Unit], addresses: Int64) -> None:
        size, new, count = table.settings.block_tokens, query.shape[2], len(units)
        cut: list[Segment] = [self._cut[unit.segment] for unit in units]
        firsts = np.array([segment.first * size for segment in cut])
        ends = np.array([min(segment.end * size, table.tokens) for segment in cut])
        positions = np.arange(table.tokens - new, table.tokens)
        own = slice(self._number(units[0]), self._number(units[0]) + count)
        batch = AttentionBatch(
            self._queries(query, [unit.row for unit in units]),
            np.append(0, np.cumsum([segment.end - segment.first for segment in cut])), addresses, ends - firsts, firsts,
            np.tile(positions, (count, 1)), cut[0].layout, self._form[2], None,
        )  # fmt: skip
        attend(batch, into=(self._out[own], self._lse[own]))

    def _queries(self, query: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Those of some sequences, in memory that is kept."""
        if self._rows == 1:
            return query.expand(len(rows), -1, -1, -1)
        kept = self._some
        if kept is None or len(kept) < len(rows) or kept.dtype is not query.dtype:
            kept = self._some = query.new_empty(len(rows), *query.shape[1:])
        for place, row in enumerate(rows):
            kept[place].copy_(query[row])
        return kept[: len(rows)]


def _scratch(table: BlockTable, lists: int, heads: int, new: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory that all tables share, as one after the other attends: rows of queries, out [lists, Hq, T, V], lse."""
    width, rows = table.layouts.plain.output_width, heads * new
    sizes = rows_elements(table.layouts.plain, lists, rows), lists * rows * width, lists * rows
    scratch, out, lse = table.pool.scratch(sum(sizes)).split([*sizes])
    return scratch, out.view(lists, heads, new, width), lse.view(lists, heads, new)


def attend_prepared(
    table: BlockTable, query: torch.Tensor, scale: float, sinks: torch.Tensor | None
) -> torch.Tensor | None:
    """Attention of the last tokens of a table; None where some of the blocks are in an accelerator's memory.

    Args:
        table: the history; the caller holds its pool's lock.
        query: [B, Hq, T, D], contiguous.
        scale: of the scores.
        sinks: [Hq] or None.

    Raises:
        StorageError, StoreCorruptError: a block cannot be read.
    """
    form, known = (query.shape[1], query.shape[2], scale), table.few_tokens
    if known is None or not known.is_of(table, *form):
        known = table.few_tokens = FewTokens(table, *form)
    if not known.is_below:
        return None
    out = known.attend(table, query, sinks)
    pool = table.pool
    if not known.cold.units:
        if pool.staging.is_busy:
            # For another table, or this one before it changed.
            pool.staging.drop_all()
        if pool.below.blocks_written and table.follower is not None:
            read_ahead(table.follower(), pool)
    return out
