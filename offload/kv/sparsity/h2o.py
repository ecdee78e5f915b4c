"""Heavy hitters (H2O, Zhang et al., 2023): blocks to which much attention went, and the newest; others are forgotten.

Lossy. Attention is added up block by block over all heads of a layer: a block is what is kept and freed, so that
evicting moves no tokens. A prompt's attention is taken from a sample of its queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.merge_parts import merge_parts
from cpu_kernels.shares import add_shares
from offload.devices.host_threads import kernel_pool
from offload.kv.attention import parts_in_place, parts_of_few
from offload.kv.sparsity.base import TableSparsity

if TYPE_CHECKING:
    from offload.kv.table import BlockTable

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

SAMPLED_QUERIES = 16
"""Of a long pass."""


class H2o(TableSparsity):
    """Keeps a share of all blocks, half of them the newest and half those with most attention.

    Nothing is evicted while a prompt is read, only in passes of few tokens.
    """

    watches_prompts = True

    def __init__(self, share: float) -> None:
        """One of an empty table.

        Args:
            share: of blocks that are kept, above 0 and at most 1.
        """
        self._share = share
        self._memory: Float64 = np.zeros((0, 0))
        self._columns = 0

    def watch(self, table: BlockTable, query: torch.Tensor, scale: float, valid: Bool | None) -> None:
        """Add a sample of the queries' attention, for all of them."""
        new = query.shape[2]
        picked = np.unique(np.linspace(0, new - 1, SAMPLED_QUERIES).round().astype(np.int64))
        sample, positions = query[:, :, picked], table.tokens - new + picked
        step, held = table.settings.segment_blocks, table.held_valid(valid)
        with table.pool.use():
            lse = [
                parts_in_place(
                    table, sample, scale, valid=held, positions=positions, step=1, ahead=False,
                    columns=(first, min(first + step, table.columns)),
                )[1]
                for first in range(0, table.columns, step)
            ]  # fmt: skip
        self._add(torch.cat(lse, 1), new / len(picked))

    def attend(
        self, table: BlockTable, query: torch.Tensor, scale: float, valid: Bool | None, sinks: torch.Tensor | None
    ) -> torch.Tensor | None:
        """See there; what this pass evicts is gone for the next."""
        counters = table.pool.counters.sparsity
        with table.pool.use():
            parts = parts_of_few(table, query, scale, table.held_valid(valid), step=1)
            self._add(parts[1], 1.0)
            # Before blocks go, for parts lie in memory that all tables share.
            out = merge_parts(*parts, sinks, kernel_pool())
            if table.evicted is None:
                counters.full_steps += 1
            else:
                counters.sparse_steps += 1
            self._evict(table, valid)
        return out

    def _add(self, lse: torch.Tensor, weight: float) -> None:
        """Attention of queries to each block, from lse [B, columns, Hq, T]."""
        batch, columns = lse.shape[:2]
        self._reserve(batch, columns)
        add_shares(lse, weight, self._memory[:, :columns])
        self._columns = columns

    def _reserve(self, sequences: int, columns: int) -> None:
        """Make room; columns that are new have had nothing."""
        if self._memory.shape[1] < columns or len(self._memory) != sequences:
            # Twice what is needed, so that growing copies each number a few times at most.
            wider = np.zeros((sequences, 2 * columns))
            if self._columns:
                wider[:, : self._columns] = self._mass
            self._memory = wider
        self._memory[:, self._columns : columns] = 0.0

    @property
    def _mass(self) -> Float64:
        """Float64 [sequences, columns]."""
        return self._memory[:, : self._columns]

    def _set_mass(self, mass: Float64) -> None:
        self._memory, self._columns = mass, mass.shape[1]

    def _evict(self, table: BlockTable, valid: Bool | None) -> None:
        size = table.settings.block_tokens
        budget = max(2, int(np.ceil(self._share * -(-table.length // size))))
        newest = max(table.columns - budget // 2, 0)
        excess = min(table.columns - budget, table.sealed, newest)
        if excess <= 0:
            return
        hitters = self._mass[:, : min(table.sealed, newest)]
        gone = np.ascontiguousarray(np.argsort(hitters, 1, kind="stable")[:, :excess])
        if table.evicted is None:
            lost = np.take_along_axis(hitters, gone, 1).sum(1) / self._mass.sum(1)
            table.pool.counters.sparsity.note_captured(1 - float(lost.mean()))
        keep = np.ones(self._mass.shape, np.bool_)
        np.put_along_axis(keep, gone, False, 1)
        table.drop(gone, valid)
        left = self._mass[keep].reshape(len(keep), -1)
        self._columns = left.shape[1]
        self._mass[:] = left

    def cut(self, table: BlockTable) -> None:
        """See there. The first column that is not sealed keeps what it had, and goes on."""
        self._columns = min(self._columns, table.sealed + 1)

    def select(self, rows: Int64) -> None:
        """See there."""
        self._set_mass(self._mass[rows] if self._columns else np.zeros((0, 0)))

    def copy(self) -> H2o:
        """See there."""
        other = H2o(self._share)
        other._set_mass(self._mass.copy())
        return other
