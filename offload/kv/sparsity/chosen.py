"""Attention to some blocks of a table, of each key-value head others, wherever they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.chosen_attention import ChosenAttention
from offload.devices.host_threads import kernel_pool
from offload.kv.stream import ColdUnits, Stream, Unit

if TYPE_CHECKING:
    from offload.kv.table import BlockTable

Bool = npt.NDArray[np.bool_]


def attend_to_chosen(
    table: BlockTable, query: torch.Tensor, attention: ChosenAttention, valid: Bool | None, out: torch.Tensor,
    lse: torch.Tensor,
) -> None:  # fmt: skip
    """Attention to sealed blocks before the query; only those that a head chose are read.

    A block on disk is read whole, whichever of its heads is attended to. What is cut where depends on the choice alone,
    not on where blocks are, and so do the result's bits. The caller holds the pool's lock.

    Args:
        table: the history.
        query: [B, Hq, T, key width], contiguous.
        attention: of these, with what was chosen.
        valid: bool [B, tokens], False where a token is padding; None for none.
        out: fp32 [units, B, Hq, T, value width], written.
        lse: fp32 [units, B, Hq, T], written; minus infinity of units that a sequence does not have.

    Raises:
        StorageError, StoreCorruptError: a block cannot be read.
    """
    blocks = table.all_blocks(table.columns)
    attention.look(blocks, table.pool.addresses, valid)

    def unit(number: int) -> Unit:
        sequence, place = divmod(int(attention.cold[number]), attention.units)
        return Unit(place, sequence, blocks[sequence, attention.columns(sequence, place)])

    # What has to be read is, while the rest is attended.
    stream = Stream(table, ColdUnits.made_when_asked(table.pool, len(attention.cold), unit))
    attention.attend(query, out, lse, kernel_pool())
    for _ in range(len(attention.cold)):
        with stream.take_some(1) as (units, addresses):
            place, sequence, _ = units[0]
            attention.attend_unit(query, sequence, place, addresses, out, lse, kernel_pool())
