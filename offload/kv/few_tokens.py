"""Attention of a few new tokens to a table whose blocks are where they were for the step before.

Nearly every step of decode is such a one. What attention has to find out about a table, which costs more than attention
to a few thousand tokens, is kept until a block of any table comes, goes or moves, and so is the memory that attention
writes to; masks are read in place: a step allocates nothing that grows with the history.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.prepared_attention import BlockLists, PreparedAttention, rows_elements
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

    A segment of a sequence is a list of blocks. Those in memory, the host's and one that host memory plays, are
    prepared; others, which come to another place with every step, are attended as they come.

    Attributes:
        holds: whether a step can be made of it; False where blocks are in the memory of an accelerator with kernels of
            its own, of which nothing is kept.
        cold: lists that have to be read.
    """

    def __init__(
        self, table: BlockTable, heads: int, new: int, scale: float, *, first: int = 0, step: int | None = None,
        before: int = 0,
    ) -> None:  # fmt: skip
        """Look at a table. The caller holds the pool's lock.

        Args:
            table: with the new tokens.
            heads: of queries.
            new: tokens of each sequence.
            scale: of the scores.
            first: column from which on is attended.
            step: columns of a segment; None for those of the settings.
            before: parts of each sequence that are another's, before its own.
        """
        cut, rows = segments(table, table.columns, first, step), table.sequences
        tiers = tiers_of(table, cut)
        self._form = heads, new, scale, first, step, before
        self._version = table.version
        self.holds = True
        self._cut, self._rows, self._before = cut, rows, before
        self._is_accelerated = bool(tiers.above.any())
        # Part after part, those of all sequences in turn.
        queries, self.out, self.lse = _scratch(table, (before + len(cut)) * rows, heads, new)
        # Growing it makes what others keep worthless.
        self._version = table.version
        # Segment after segment, so that sequences that share one come next to each other.
        self.cold = ColdUnits(table.pool, sorted(units_of(table, cut, tiers.apart)))
        packed = sum(segment.layout is not table.layouts.plain for segment in cut)
        self._parts: list[PreparedAttention] = []
        for tier in tiers.above, tiers.below:
            for start, end in (0, packed), (packed, len(cut)):
                here = tier.copy()
                here[:, :start] = here[:, end:] = False
                if here.any():
                    told = self._lists(table, here), scale, queries, self.out, self.lse
                    above = table.pool.above if tier is tiers.above else None
                    part = PreparedAttention(*told) if above is None else above.accelerator.prepare_attention(*told)
                    if part is None:
                        self.holds = False
                        return
                    self._parts.append(part)

    def _lists(self, table: BlockTable, here: Bool) -> BlockLists:
        """Some segments [sequences, segments], all of one layout."""
        cut, size = self._cut, table.settings.block_tokens
        numbers, rows = np.nonzero(here.T)
        some = [cut[number] for number in numbers]
        firsts = np.array([segment.first for segment in some]) * size
        ends = np.array([min(segment.end * size, table.tokens) for segment in some])
        blocks = [table.blocks(row, one.first, one.end) for one, row in zip(some, rows.tolist(), strict=True)]
        return BlockLists(
            some[0].layout, np.append(0, np.cumsum([len(one) for one in blocks])),
            table.pool.addresses[np.concatenate(blocks)], ends - firsts, firsts, rows,
            (self._before + numbers) * self._rows + rows, np.flatnonzero(numbers == len(cut) - 1), self._rows,
        )  # fmt: skip

    def is_of(
        self, table: BlockTable, heads: int, new: int, scale: float, *, first: int = 0, step: int | None = None,
        before: int = 0,
    ) -> bool:  # fmt: skip
        """Whether all of it still holds."""
        return self.is_current(table) and self._form == (heads, new, scale, first, step, before)

    def is_current(self, table: BlockTable) -> bool:
        """Whether the table's blocks are where they were."""
        return self._version == table.version

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where parts are, those of others before its own: out [B, parts, Hq, T, V] and lse [B, parts, Hq, T]."""
        heads, new = self._form[:2]
        shape = self._before + len(self._cut), self._rows, heads, new
        return self.out.view(*shape, -1).transpose(0, 1), self.lse.view(shape).transpose(0, 1)

    def attend(self, table: BlockTable, query: torch.Tensor, valid: Bool | None, *, ahead: bool = True) -> None:
        """Fill its own parts.

        Args:
            table: with the new tokens.
            query: [B, Hq, T, D], contiguous.
            valid: bool [B, tokens], False where a token is padding; None for none.
            ahead: begin to read what the next table will be asked for.

        Raises:
            StorageError, StoreCorruptError: a block cannot be read.
        """
        pool, last = kernel_pool(), self._cut[-1]
        # What has to be read is, while the rest is attended.
        stream = Stream(table, self.cold) if self.cold.units else None
        attend_cold = partial(self._attend_some, table, query, valid)
        if stream is not None:
            stream.pass_on(self._alike, attend_cold, waits=False)
        length = table.tokens - last.first * table.settings.block_tokens
        for part in self._parts:
            part.attend(query, length, table.tokens - 1, pool, valid)
        table.pool.counters.accelerated_steps += self._is_accelerated
        if stream is not None:
            stream.pass_on(self._alike, attend_cold, waits=True)
            if ahead:
                stream.look_ahead()
            return
        if table.pool.staging.is_busy:
            # For another table, or this one before it changed.
            table.pool.staging.drop_all()
        if ahead and table.pool.below.blocks_written and table.follower is not None:
            read_ahead(table.follower(), table.pool)

    def _alike(self, units: Sequence[Unit]) -> int:
        """How many of some units follow each other and are of one layout."""
        first, layout = self._place(units[0]), self._cut[units[0].segment].layout
        count = 1
        while (
            count < len(units)
            and self._place(units[count]) == first + count
            and self._cut[units[count].segment].layout is layout
        ):
            count += 1
        return count

    def _place(self, unit: Unit) -> int:
        return (self._before + unit.segment) * self._rows + unit.row

    def _attend_some(
        self, table: BlockTable, query: torch.Tensor, valid: Bool | None, units: Sequence[Unit], addresses: Int64
    ) -> None:
        size, new, count = table.settings.block_tokens, query.shape[2], len(units)
        cut: list[Segment] = [self._cut[unit.segment] for unit in units]
        firsts = np.array([segment.first * size for segment in cut])
        ends = np.array([min(segment.end * size, table.tokens) for segment in cut])
        positions = np.arange(table.tokens - new, table.tokens)
        own = slice(self._place(units[0]), self._place(units[0]) + count)
        batch = AttentionBatch(
            query, np.append(0, np.cumsum([segment.end - segment.first for segment in cut])), addresses, ends - firsts,
            firsts, np.tile(positions, (count, 1)), cut[0].layout, self._form[2], valid,
        )  # fmt: skip
        attend(batch, into=(self.out[own], self.lse[own]), rows=np.array([unit.row for unit in units]))


def _scratch(table: BlockTable, places: int, heads: int, new: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory that all tables share, as one after the other attends: rows of queries, out [places, Hq, T, V], lse."""
    width, rows = table.layouts.plain.output_width, heads * new
    sizes = rows_elements(table.layouts.plain, table.sequences, rows), places * rows * width, places * rows
    queries, out, lse = table.pool.scratch(sum(sizes)).split([*sizes])
    return queries, out.view(places, heads, new, width), lse.view(places, heads, new)


def attend_prepared(
    table: BlockTable, query: torch.Tensor, scale: float, valid: Bool | None, *, step: int | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Attention of the last tokens of a table to each segment by itself, in memory that all tables share.

    Args:
        table: the history; the caller holds its pool's lock.
        query: [B, Hq, T, D], contiguous.
        scale: of the scores.
        valid: bool [B, tokens], False where a token is padding; None for none.
        step: columns of a segment; None for those of the settings.

    Returns:
        out fp32 [B, segments, Hq, T, V] and lse fp32 [B, segments, Hq, T]; None where some of the blocks are in the
        memory of an accelerator with kernels of its own.

    Raises:
        StorageError, StoreCorruptError: a block cannot be read.
    """
    heads, new, known = query.shape[1], query.shape[2], table.few_tokens
    if known is None or not known.is_of(table, heads, new, scale, step=step):
        known = table.few_tokens = FewTokens(table, heads, new, scale, step=step)
    if not known.holds:
        return None
    known.attend(table, query, valid)
    return known.parts
