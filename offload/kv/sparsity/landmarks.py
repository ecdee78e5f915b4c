"""What is known of a table's blocks without reading them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.block_selection import landmarks
from cpu_kernels.kv_blocks import read_tokens

if TYPE_CHECKING:
    from offload.kv.table import BlockTable

Int64 = npt.NDArray[np.int64]


class Landmarks:
    """The smallest and largest number of each channel of the keys of every sealed block of a table, as it is kept.

    Attributes:
        columns: blocks of each sequence that they are known of.
    """

    def __init__(self) -> None:
        self.columns = 0
        self._bounds = torch.empty(2, 0, 0, 0, 0)

    def bounds(self, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the first so many blocks: smallest and largest, fp32 [sequences, heads, columns, key width]."""
        return self._bounds[0, :, :, :columns], self._bounds[1, :, :, :columns]

    def add(self, table: BlockTable, column: int) -> None:
        """Those of a column's blocks, which are in memory. The caller holds the pool's lock."""
        assert column == self.columns
        layout = table.layouts.packed or table.layouts.plain
        self._reserve(table.sequences, layout.kv_heads, column + 1, layout.key_width)
        blocks, rows = np.unique(table.all_blocks(column + 1)[:, column], return_inverse=True)
        found = []
        for block in blocks:
            keys, _ = read_tokens(table.pool.addresses[[block]], 0, layout.block_tokens, layout)
            found.append(torch.stack(landmarks(keys, layout.block_tokens)))
        self._bounds[:, :, :, column] = torch.stack(found, 1)[:, rows, :, 0]
        self.columns = column + 1

    def _reserve(self, sequences: int, heads: int, columns: int, width: int) -> None:
        room = self._bounds.shape[3]
        if self.columns == 0:
            room = 0
        if columns > room:
            # Twice what there was, so that growing copies each number a few times at most.
            wider = torch.empty(2, sequences, heads, max(columns, 2 * room, 16), width)
            if room:
                wider[:, :, :, : self.columns] = self._bounds[:, :, :, : self.columns]
            self._bounds = wider

    def cut(self, columns: int) -> None:
        """Forget all but the first so many blocks."""
        self.columns = min(self.columns, columns)

    def select(self, rows: Int64) -> None:
        """Those of some sequences."""
        if self.columns:
            self._bounds = self._bounds[:, torch.from_numpy(rows)]

    def copy(self) -> Landmarks:
        """The same, apart."""
        other = Landmarks()
        other.columns, other._bounds = self.columns, self._bounds.clone()
        return other
