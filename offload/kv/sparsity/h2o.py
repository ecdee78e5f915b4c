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
from offload.devices.host_threads import kernel_pool
from offload.kv.attention import parts_in_place
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
        self._mass: Float64 = np.zeros((0, 0))

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
            out, lse = parts_in_place(table, query, scale, valid=table.held_valid(valid), step=1)
            self._add(lse, 1.0)
            if table.evicted is None:
                counters.full_steps += 1
            else:
                counters.sparse_steps += 1
            self._evict(table, valid)
        return merge_parts(out, lse, sinks, kernel_pool())

    def _add(self, lse: torch.Tensor, weight: float) -> None:
        """Attention of queries to each block, from lse [B, columns, Hq, T]."""
        shares = torch.exp(lse - lse.logsumexp(1, keepdim=True)).nan_to_num_(0.0)
        mass = weight * shares.sum((2, 3)).double().numpy()
        before = self._mass.shape[1] if len(self._mass) else 0
        if before:
            mass[:, :before] += self._mass
        self._mass = mass

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
        self._mass = self._mass[keep].reshape(len(keep), -1)

    def cut(self, table: BlockTable) -> None:
        """See there. The first column that is not sealed keeps what it had, and goes on."""
        self._mass = self._mass[:, : table.sealed + 1]

    def select(self, rows: Int64) -> None:
        """See there."""
        if len(self._mass):
            self._mass = self._mass[rows]

    def copy(self) -> H2o:
        """See there."""
        other = H2o(self._share)
        other._mass = self._mass.copy()
        return other
