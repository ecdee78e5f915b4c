"""Attention to the best blocks by landmarks: lossy; of the other blocks nothing is read, from RAM or from disk.

A block is as good as its best token is estimated to be from a sketch of the block's keys (`formats.key_sketch`), kept
in memory while blocks are on disk as in ShadowKV (Sun et al., 2024). The first block and the newest tokens are always
attended to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.block_selection import captured_mass, choose_blocks
from cpu_kernels.merge_parts import merge_parts
from offload.devices.host_threads import kernel_pool
from offload.kv.attention import parts_in_place
from offload.kv.sparsity.base import TableSparsity
from offload.kv.sparsity.chosen import attend_to_chosen
from offload.kv.sparsity.landmarks import Landmarks

if TYPE_CHECKING:
    from offload.kv.table import BlockTable

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]

MEASURED_STEPS = 512
"""Every so many steps of a layer, beginning with the first, all blocks are read to see what the chosen ones have."""


class TopK(TableSparsity):
    """Each key-value head attends to a share of the blocks that are not among the newest."""

    def __init__(self, share: float, known: Landmarks | None = None) -> None:
        """One of an empty table.

        Args:
            share: of blocks, above 0 and at most 1; the first block counts.
            known: landmarks of a table that is not empty.
        """
        self._share = share
        self._known = Landmarks() if known is None else known
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
        with table.pool.use():
            chosen = self._choose(table, query, old, count, valid)
            parts = [
                attend_to_chosen(table, query, chosen, scale, valid),
                parts_in_place(table, query, scale, valid=valid, columns=(old, table.columns), ahead=False),
            ]
            out, lse = (torch.cat(part, 1) for part in zip(*parts, strict=True))
            if self._steps % MEASURED_STEPS == 0:
                whole = parts_in_place(table, query, scale, valid=valid, ahead=False)[1]
                counters.note_captured(captured_mass(lse.logsumexp(1), whole.logsumexp(1)))
        self._steps += 1
        counters.sparse_steps += 1
        return merge_parts(out, lse, sinks, kernel_pool())

    def _choose(self, table: BlockTable, query: torch.Tensor, old: int, count: int, valid: Bool | None) -> Int64:
        """int64 [B, Hk, count], ascending, of the first `old` columns."""
        scores = self._known.largest_scores(query, old)
        if valid is None:
            return choose_blocks(scores, count)
        blocks = valid[:, : old * table.settings.block_tokens].reshape(len(valid), old, -1)
        some = np.logical_or.reduce(blocks, axis=2)
        scores.masked_fill_(~torch.from_numpy(some)[:, None], -torch.inf)
        # The first block of a padded sequence is the first that is not padding alone.
        scores[np.arange(len(some)), :, some.argmax(1)] = torch.inf
        return choose_blocks(scores, count, always=0)

    def sealed(self, table: BlockTable, column: int) -> None:
        """See there."""
        self._known.add(table, column)

    def cut(self, table: BlockTable) -> None:
        """See there."""
        self._known.cut(table.sealed)

    def select(self, rows: Int64) -> None:
        """See there."""
        self._known.select(rows)

    def copy(self) -> TopK:
        """See there."""
        return TopK(self._share, self._known.copy())
