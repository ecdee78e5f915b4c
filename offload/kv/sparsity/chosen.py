"""Attention to some blocks of a table, of each key-value head others, wherever they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.block_selection import attend_to_lists
from offload.devices.host_threads import kernel_pool
from offload.kv.stream import ColdUnits, Stream, Unit

if TYPE_CHECKING:
    from offload.kv.attention import Part
    from offload.kv.table import BlockTable

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]


class _Choice(NamedTuple):
    """What a unit's heads attend to: head heads[i] to block places[i] of the unit, head after head."""

    unit: Unit
    heads: Int64
    places: Int64
    columns: Int64


def attend_to_chosen(table: BlockTable, query: torch.Tensor, chosen: Int64, scale: float, valid: Bool | None) -> Part:
    """Attention to sealed blocks before the query; only those that a head chose are read.

    A block on disk is read whole, whichever of its heads is attended to. What is cut where depends on the choice alone,
    not on where blocks are, and so do the result's bits. The caller holds the pool's lock.

    Args:
        table: the history.
        query: [B, Hq, T, key width].
        chosen: int64 [B, Hk, m], ascending columns, all of one layout.
        scale: of the scores.
        valid: bool [B, tokens], False where a token is padding; None for none.

    Returns:
        out fp32 [B, units, Hq, T, value width], lse fp32 [B, units, Hq, T]; zeros and minus infinity of units that a
        sequence does not have.

    Raises:
        StorageError, StoreCorruptError: a block cannot be read.
    """
    choices = [choice for row in range(len(chosen)) for choice in _cut(table, row, chosen[row])]
    addresses = table.pool.addresses
    cold = [bool((addresses[choice.unit.blocks] == 0).any()) for choice in choices]
    units = [choice.unit for choice, is_cold in zip(choices, cold, strict=True) if is_cold]
    stream = Stream(table, ColdUnits(table.pool, units))
    batch, heads, new, _ = query.shape
    shape = batch, 1 + max(choice.unit.segment for choice in choices), heads, new
    out, lse = torch.zeros(*shape, table.layouts.plain.output_width), torch.full(shape, -torch.inf)
    call = _Call(table, query, chosen.shape[1], scale, valid)

    def put(some: list[_Choice], lists: list[Int64]) -> None:
        rows, units = [one.unit.row for one in some], [one.unit.segment for one in some]
        out[rows, units], lse[rows, units] = call(some, lists)

    resident = [choice for choice, is_cold in zip(choices, cold, strict=True) if not is_cold]
    if resident:
        put(resident, [addresses[choice.unit.blocks] for choice in resident])
    for choice, is_cold in zip(choices, cold, strict=True):
        if is_cold:
            with stream.take() as read:
                put([choice], [read])
    return out, lse


def _cut(table: BlockTable, row: int, chosen: Int64) -> list[_Choice]:
    """One sequence's choice [Hk, m] in units of as many blocks as a segment has."""
    step, kv_heads = table.settings.segment_blocks, len(chosen)
    columns, places = np.unique(chosen, return_inverse=True)
    places = places.reshape(-1)
    heads = np.repeat(np.arange(kv_heads), chosen.shape[1])
    blocks = table.all_blocks(int(columns[-1]) + 1)[row, columns]
    choices = []
    for number, first in enumerate(range(0, len(columns), step)):
        mine = (places >= first) & (places < first + step)
        unit = Unit(number, row, blocks[first : first + step])
        choices.append(_Choice(unit, heads[mine], places[mine] - first, columns[places[mine]]))
    return choices


class _Call:
    """The kernel over units, of each of which a head has a list of its own."""

    def __init__(self, table: BlockTable, query: torch.Tensor, kv_heads: int, scale: float, valid: Bool | None) -> None:
        self._layout = table.layout_of(0)
        self._query = query
        self._kv_heads = kv_heads
        self._scale = scale
        self._blocks_valid = None
        if valid is not None:
            size = self._layout.block_tokens
            columns = valid.shape[1] // size
            self._blocks_valid = valid[:, : columns * size].reshape(len(valid), columns, size)

    def __call__(self, choices: list[_Choice], lists: list[Int64]) -> Part:
        counts = np.stack([np.bincount(choice.heads, minlength=self._kv_heads) for choice in choices])
        return attend_to_lists(
            self._query[[choice.unit.row for choice in choices]],
            counts,
            np.concatenate([at[choice.places] for choice, at in zip(choices, lists, strict=True)]),
            self._layout,
            self._scale,
            valid=self._valid(choices, counts),
            pool=kernel_pool(),
        )

    def _valid(self, choices: list[_Choice], counts: Int64) -> Bool | None:
        if self._blocks_valid is None:
            return None
        valid = np.zeros((*counts.shape, int(counts.max()), self._layout.block_tokens), np.bool_)
        for number, choice in enumerate(choices):
            starts = np.cumsum(counts[number]) - counts[number]
            order = np.arange(len(choice.heads)) - starts[choice.heads]
            valid[number, choice.heads, order] = self._blocks_valid[choice.unit.row, choice.columns]
        return valid.reshape(*counts.shape, -1)
