"""Attention over a table's blocks, wherever they are.

Exact: a history is cut into segments, each is attended by itself, and the parts are added up in the order of their
tokens, weighted by their log-sum-exp. Which tier a segment is in changes when it is attended and not the result's bits,
unless an accelerator has kernels of its own (CUDA). It attends to the segments in its memory while the CPU attends to
the others (HGCA, Deng et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.kv_blocks import read_tokens
from cpu_kernels.merge_parts import merge_parts
from offload.devices.base import AttentionBatch, AttentionWork
from offload.devices.host_attention import attend
from offload.devices.host_threads import kernel_pool
from offload.kv.few_tokens import attend_prepared
from offload.kv.pieces import attend_in_pieces
from offload.kv.stream import ColdUnits, Segment, Stream, Unit, segments, tiers_of, units_of
from offload.kv.table import BlockTable

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Part = tuple[torch.Tensor, torch.Tensor]
Expand = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def attend_in_place(
    table: BlockTable,
    query: torch.Tensor,
    scale: float,
    *,
    valid: Bool | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a sequence's last tokens, whose keys and values are in the table already, by the paged kernel.

    Args:
        table: the history.
        query: [B, Hq, T, key width] of its last T tokens.
        scale: of the scores.
        valid: bool [B, tokens], False where a token is padding; None for none.
        sinks: [Hq], a score of each head that has no value; None for none.

    Returns:
        fp32 [B, Hq, T, value width].

    Raises:
        StorageError, StoreCorruptError: a block cannot be read.
    """
    with table.pool.use():
        parts = parts_of_few(table, query, scale, valid)
        # Parts lie in memory that all tables share.
        return merge_parts(*parts, sinks, kernel_pool())


def parts_of_few(
    table: BlockTable, query: torch.Tensor, scale: float, valid: Bool | None, step: int | None = None
) -> Part:
    """`parts_in_place` of a few new tokens, in memory that holds them until the pool's lock, which the caller holds, is
    given back.

    Raises:
        StorageError, StoreCorruptError: a block cannot be read.
    """
    parts = attend_prepared(table, query.contiguous(), scale, valid, step=step)
    return parts_in_place(table, query, scale, valid=valid, step=step) if parts is None else parts


def parts_in_place(
    table: BlockTable,
    query: torch.Tensor,
    scale: float,
    *,
    valid: Bool | None = None,
    positions: Int64 | None = None,
    columns: tuple[int, int] | None = None,
    step: int | None = None,
    ahead: bool = True,
) -> Part:
    """Attention to each segment of a table by itself.

    Args:
        table: the history.
        query: [B, Hq, T, key width].
        scale: of the scores.
        valid: bool [B, tokens], False where a token is padding; None for none.
        positions: int64 [T], the queries' in the table, ascending; None for the last T.
        columns: the first and the one after the last that are attended to; None for all.
        step: columns of a segment; None for those of the settings.
        ahead: begin to read what the next table will be asked for, if that is all of it.

    Returns:
        out fp32 [B, segments, Hq, T, value width] and lse fp32 [B, segments, Hq, T]; minus infinity where a segment's
        part is another's, and out there may be anything.

    Raises:
        StorageError, StoreCorruptError: a block cannot be read.
    """
    batch, heads, new, _ = query.shape
    start, end = (0, table.columns) if columns is None else columns
    with table.pool.use():
        cut = segments(table, end, start, step)
        tiers = tiers_of(table, cut)
        # Segment after segment, so that sequences that share one come next to each other.
        units = sorted(units_of(table, cut, tiers.apart))
        stream = Stream(table, ColdUnits(table.pool, units))
        # Sequence after sequence, segment after segment: what is where changes nothing in how it is added up.
        shape = batch, len(cut), heads, new
        out = torch.empty(*shape, table.layouts.plain.output_width)
        lse = torch.empty(shape)
        if positions is None:
            positions = np.arange(table.tokens - new, table.tokens)
        call = _Call(table, cut, query, scale, positions, valid)
        above = _start_above(table, call, tiers.above)
        # Where an accelerator joins segments, the first has all.
        lse[tiers.above] = -torch.inf

        def alike(some: Sequence[Unit]) -> int:
            layouts = [cut[unit.segment].layout for unit in some]
            return next((place for place, layout in enumerate(layouts) if layout is not layouts[0]), len(layouts))

        def attend_some(some: Sequence[Unit], addresses: Int64) -> None:
            rows, places = np.array([(unit.row, unit.segment) for unit in some]).T
            out[rows, places], lse[rows, places] = attend(call.batch(rows, places, addresses))

        stream.pass_on(alike, attend_some, waits=False)
        for which in _runs_of_one_layout(cut, tiers.below):
            rows, places = np.nonzero(which)
            out[rows, places], lse[rows, places] = attend(call.batch(rows, places, call.addresses(which)))
        stream.pass_on(alike, attend_some, waits=True)
        for part in above:
            out[part.rows, part.places], lse[part.rows, part.places] = part.work.finish()
        if ahead:
            stream.look_ahead()
    return out, lse


class _Above(NamedTuple):
    """Attention that an accelerator has begun.

    Attributes:
        rows: int64 [n], of each list its sequence.
        places: int64 [n], the segment where its part belongs.
        work: the parts.
    """

    rows: Int64
    places: Int64
    work: AttentionWork


def _start_above(table: BlockTable, call: _Call, which: Bool) -> list[_Above]:
    """Let the accelerator begin with the segments in its memory."""
    if not which.any():
        return []
    tier = table.pool.above
    assert tier is not None
    table.pool.counters.accelerated_steps += 1
    accelerator, parts = tier.accelerator, []
    for own in _runs_of_one_layout(call.cut, which):
        rows, places = np.nonzero(own)
        starts = np.arange(len(rows))
        if accelerator.joins_segments:
            starts = np.flatnonzero((np.diff(rows, prepend=-1) != 0) | (np.diff(places, prepend=-2) != 1))
        batch = call.batch(rows, places, call.addresses(own), starts)
        parts.append(_Above(rows[starts], places[starts], accelerator.start_attention(batch)))
    return parts


def _runs_of_one_layout(cut: list[Segment], which: Bool) -> Iterator[Bool]:
    """Of some segments [sequences, segments] the packed ones, and the plain ones, where there are any."""
    packed = sum(segment.layout is cut[0].layout for segment in cut) if cut else 0
    for first, last in (0, packed), (packed, len(cut)):
        own = which.copy()
        own[:, :first] = own[:, last:] = False
        if own.any():
            yield own


class _Call:
    """Batches for kernels over segments, each a list of blocks of its own.

    Attributes:
        cut: the segments.
    """

    def __init__(
        self,
        table: BlockTable,
        cut: list[Segment],
        query: torch.Tensor,
        scale: float,
        positions: Int64,
        valid: Bool | None,
    ) -> None:
        size = table.settings.block_tokens
        self._table = table
        self.cut = cut
        self._query = query
        self._scale = scale
        self._valid = valid
        self._blocks = np.array([segment.end - segment.first for segment in cut])
        self._firsts = np.array([segment.first * size for segment in cut])
        self._lengths = np.minimum(self._firsts + self._blocks * size, table.tokens) - self._firsts
        self._positions = positions

    def addresses(self, which: Bool) -> Int64:
        """Of the blocks of some segments [sequences, segments], each in a memory of some kind."""
        columns = np.repeat(which, self._blocks, axis=1)
        first = self.cut[0].first
        blocks = self._table.all_blocks(first + columns.shape[1])[:, first:]
        found: Int64 = self._table.pool.addresses[blocks[columns]]
        return found

    def batch(self, rows: Int64, columns: Int64, addresses: Int64, starts: Int64 | None = None) -> AttentionBatch:
        """Sequence rows[i] attends to segment columns[i], all of one layout.

        Args:
            rows: int64 [n].
            columns: int64 [n].
            addresses: of the blocks of all.
            starts: int64, which of them begin a list; None for a list each.
        """
        blocks, lengths, firsts = self._blocks[columns], self._lengths[columns], self._firsts[columns]
        if starts is not None and len(starts) < len(rows):
            blocks, lengths = (np.add.reduceat(numbers, starts) for numbers in (blocks, lengths))
            rows, firsts = rows[starts], firsts[starts]
        return AttentionBatch(
            self._query if len(rows) == len(self._query) == 1 else self._query[rows],
            np.concatenate([[0], np.cumsum(blocks)]),
            addresses,
            lengths,
            firsts,
            np.tile(self._positions, (len(rows), 1)),
            self.cut[columns[0]].layout,
            self._scale,
            None if self._valid is None else self._valid[rows],
        )


def attend_few(
    table: BlockTable,
    query: torch.Tensor,
    scale: float,
    *,
    valid: Bool | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `attend_in_place`; where the table is attended to in part, that.

    Args:
        table: the history.
        query: [B, Hq, T, key width] of its last T tokens.
        scale: of the scores.
        valid: bool [B, tokens, evicted ones too], False where a token is padding; None for none.
        sinks: see there.

    Raises:
        StorageError, StoreCorruptError: a block cannot be read.
    """
    if table.sparsity is not None:
        out = table.sparsity.attend(table, query, scale, valid, sinks)
        if out is not None:
            return out
    return attend_in_place(table, query, scale, valid=table.held_valid(valid), sinks=sinks)


def attend_by_segments(
    table: BlockTable,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    valid: Bool | None = None,
    sinks: torch.Tensor | None = None,
    expand: Expand | None = None,
) -> torch.Tensor:
    """Attention of many new tokens, by matrix products over one segment at a time, in fp32, where these tokens are.

    Args:
        table: the history, which ends with the new tokens.
        query: [B, Hq, T, D] of its last T tokens, on any device; so are keys, values and sinks.
        keys: [B, Hk, T, D] of these, as they were before the table rounded them.
        values: [B, Hk, T, V].
        scale: of the scores.
        valid: bool [B, tokens], False where a token is padding; None for none.
        sinks: [Hq], a score of each head that has no value; None for none.
        expand: makes keys and values [1, Hk, n, D], [1, Hk, n, V] out of what the table keeps; None where it keeps
            them.

    Returns:
        fp32 [B, Hq, T, V].

    Raises:
        StorageError, StoreCorruptError: a block cannot be read.
    """
    batch, _, new, _ = query.shape
    past = table.tokens - new
    totals = []
    with table.pool.use():
        cut = segments(table, -(-past // table.settings.block_tokens))
        tiers = tiers_of(table, cut)
        stream = Stream(table, ColdUnits(table.pool, units_of(table, cut, tiers.apart)))
        for row in range(batch):
            own = None if valid is None else torch.from_numpy(valid[row]).to(query.device)
            q = query[row : row + 1].float()
            total = _among_new(
                q, keys[row : row + 1], values[row : row + 1], scale, None if own is None else own[past:]
            )
            for index, segment in enumerate(cut):
                unit = Unit(index, row, table.blocks(row, segment.first, segment.end))
                source = stream if tiers.apart[row, index] else None
                read = _read(table, segment, unit, source, past, above=bool(tiers.above[row, index]))
                k, v = (part.to(query.device) for part in read)
                if expand is not None:
                    k, v = expand(k, v)
                first = segment.first * table.settings.block_tokens
                seen = None if own is None else own[first : first + k.shape[2]]
                total = _add(total, _history(q, k, v, scale, seen))
            totals.append(total)
        stream.look_ahead()
    out, lse = torch.cat([one[0] for one in totals]), torch.cat([one[1] for one in totals])
    if sinks is not None:
        whole = torch.logaddexp(lse, sinks.float()[None, :, None])
        out *= torch.exp(lse - whole)[..., None]
    return out


def _read(table: BlockTable, segment: Segment, unit: Unit, stream: Stream | None, past: int, *, above: bool) -> Part:
    """Keys and values [1, Hk, n, D] of a segment's tokens before `past`, as fp32."""
    tokens = min(segment.end * table.settings.block_tokens, past) - segment.first * table.settings.block_tokens
    if above:
        assert table.pool.above is not None
        accelerator = table.pool.above.accelerator
        keys, values = accelerator.read_blocks(table.pool.addresses[unit.blocks], tokens, segment.layout)
    elif stream is None:
        keys, values = read_tokens(table.pool.addresses[unit.blocks], 0, tokens, segment.layout)
    else:
        with stream.take() as addresses:
            keys, values = read_tokens(addresses, 0, tokens, segment.layout)
    return keys[None], values[None]


def _among_new(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, valid: torch.Tensor | None
) -> Part:
    """Causal attention of new tokens to each other."""
    group, new = query.shape[1] // keys.shape[1], query.shape[2]
    k, v = (part.float().repeat_interleave(group, 1) for part in (keys, values))
    if valid is None or bool(valid.all()):
        return _flash(query, k, v, scale, None, causal=True)
    seen = torch.ones(new, new, dtype=torch.bool, device=query.device).tril_() & valid
    out, lse = _flash(query, k, v, scale, _additive(seen), causal=False)
    # Rows of padding see nothing.
    return out, lse.masked_fill(~seen.any(1), -torch.inf)


def _history(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, valid: torch.Tensor | None
) -> Part | None:
    """Attention of all new tokens to all of a segment: the query heads that share a key are rows of one product."""
    _, heads, new, width = query.shape
    kv_heads, tokens = keys.shape[1:3]
    rows = query.reshape(1, kv_heads, heads // kv_heads * new, width)
    mask = None
    if valid is not None and not bool(valid.all()):
        if not bool(valid.any()):
            return None
        mask = _additive(valid).expand(rows.shape[2], tokens)
    out, lse = _flash(rows, keys, values, scale, mask, causal=False)
    return out.reshape(1, heads, new, -1), lse.reshape(1, heads, new)


def _additive(seen: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)


def _flash(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    *,
    causal: bool,
) -> Part:
    """Torch's fused attention with its log-sum-exp; it wants keys and values of one width."""
    if not query.is_cpu:
        return attend_in_pieces(query, keys, values, scale, mask, causal=causal)
    width, value_width = keys.shape[3], values.shape[3]
    if width > value_width:
        values = torch.nn.functional.pad(values, (0, width - value_width))
    elif width < value_width:
        query, keys = (torch.nn.functional.pad(part, (0, value_width - width)) for part in (query, keys))
    options: Any = {} if mask is None else {"attn_mask": mask[None, None]}
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, causal, scale=scale, **options
    )
    return out[..., :value_width], lse


def _add(total: Part, part: Part | None) -> Part:
    """Attention over the tokens of both."""
    if part is None:
        return total
    lse = torch.logaddexp(total[1], part[1])
    shares = [torch.exp(one[1] - lse).nan_to_num_(0.0)[..., None] for one in (total, part)]
    return total[0] * shares[0] + part[0] * shares[1], lse
