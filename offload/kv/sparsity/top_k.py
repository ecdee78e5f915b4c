"""Attention to the best blocks by landmarks: lossy; of the other blocks nothing is read, from RAM or from disk.

A block is as good as its best token is estimated to be from a sketch of the block's keys (`formats.key_sketch`), kept
in memory while blocks are on disk as in ShadowKV (Sun et al., 2024). The first block and the newest tokens are always
attended to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.block_selection import captured_mass, choose_blocks
from cpu_kernels.chosen_attention import ChosenAttention
from cpu_kernels.merge_parts import merge_parts
from offload.devices.host_threads import kernel_pool
from offload.kv.attention import Part, parts_in_place
from offload.kv.few_tokens import FewTokens
from offload.kv.sparsity.base import TableSparsity
from offload.kv.sparsity.chosen import attend_to_chosen
from offload.kv.sparsity.landmarks import Landmarks

if TYPE_CHECKING:
    from offload.kv.table import BlockTable

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]

MEASURED_STEPS = 512
"""Every so many steps of a layer, beginning with the first, all blocks are read to see what the chosen ones have."""


class _Known(NamedTuple):
    """What is kept from one step to the next.

    Attributes:
        form: what it depends on.
        scores: fp32 [B, Hk, old], memory.
        chosen: attention to old blocks.
        newest: to those after them, whose parts lie behind the chosen ones'.
    """

    form: tuple[object, ...]
    scores: torch.Tensor
    chosen: ChosenAttention
    newest: FewTokens

    def chosen_parts(self) -> Part:
        """Memory for out [units, B, Hq, T, V] and lse [units, B, Hq, T]."""
        newest, units, batch = self.newest, self.chosen.units, len(self.scores)
        return tuple(part[: units * batch].unflatten(0, (units, batch)) for part in (newest.out, newest.lse))


def _newest(table: BlockTable, query: torch.Tensor, scale: float, old: int, units: int) -> FewTokens:
    newest = FewTokens(table, query.shape[1], query.shape[2], scale, first=old, before=units)
    assert newest.holds, "top-k does not go with blocks in an accelerator's memory"
    return newest


class TopK(TableSparsity):
    """Each key-value head attends to a share of the blocks that are not among the newest."""

    def __init__(self, share: float, known: Landmarks | None = None) -> None:
        """One of an empty table.

        Args:
            share: of blocks, above 0 and at most 1; the first block counts.
            known: landmarks of a table that is not empty.
        """
        self._share = share
        self._landmarks = Landmarks() if known is None else known
        self._kept: _Known | None = None
        self._steps = 0

    def attend(
        self, table: BlockTable, query: torch.Tensor, scale: float, valid: Bool | None, sinks: torch.Tensor | None
    ) -> torch.Tensor | None:
        """See there; None for a history that is too short to leave blocks out."""
        settings, counters = table.settings, table.pool.counters.sparsity
        newest = max(settings.recent_tokens, query.shape[2])
        old = min(table.sealed, max(0, table.tokens - newest) // settings.block_tokens)
        count = int(np.ceil(self._share * old))
        if count >= old:
            counters.full_steps += 1
            return None
        query = query.contiguous()
        with table.pool.use():
            known = self._known_of(table, query, scale, old, count)
            self._landmarks.largest_scores(query, known.scores)
            choose_blocks(
                known.scores, count, valid=valid, block_tokens=settings.block_tokens, into=known.chosen.chosen
            )
            out, lse = known.chosen_parts()
            attend_to_chosen(table, query, known.chosen, valid, out, lse)
            known.newest.attend(table, query, valid, ahead=False)
            parts = known.newest.parts
            if self._steps % MEASURED_STEPS == 0:
                whole = parts_in_place(table, query, scale, valid=valid, ahead=False)[1]
                counters.note_captured(captured_mass(parts[1].logsumexp(1), whole.logsumexp(1)))
            merged = merge_parts(*parts, sinks, kernel_pool())
        self._steps += 1
        counters.sparse_steps += 1
        return merged

    def _known_of(self, table: BlockTable, query: torch.Tensor, scale: float, old: int, count: int) -> _Known:
        """What is kept of a table, anew where it does not hold any more."""
        kept, form = self._kept, (query.shape[:3], scale, old, count)
        if kept is None or kept.form != form:
            shape, step = (query.shape[0], query.shape[1], query.shape[2]), table.settings.segment_blocks
            chosen = ChosenAttention(table.layout_of(0), scale, shape, count, old, step)
            scores = torch.empty(query.shape[0], table.layouts.plain.kv_heads, old)
            kept = self._kept = _Known(form, scores, chosen, _newest(table, query, scale, old, chosen.units))
        if not kept.newest.is_current(table):
            kept = self._kept = kept._replace(newest=_newest(table, query, scale, old, kept.chosen.units))
        return kept

    def sealed(self, table: BlockTable, column: int) -> None:
        """See there."""
        self._landmarks.add(table, column)

    def cut(self, table: BlockTable) -> None:
        """See there."""
        self._landmarks.cut(table.sealed)

    def select(self, rows: Int64) -> None:
        """See there."""
        self._landmarks.select(rows)

    def copy(self) -> TopK:
        """See there."""
        return TopK(self._share, self._landmarks.copy())
