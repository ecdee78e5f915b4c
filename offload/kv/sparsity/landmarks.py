"""What is known of a table's blocks without reading them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.key_sketch import estimate_largest_scores, sketch_blocks
from cpu_kernels.kv_blocks import read_tokens
from formats.key_sketch import SketchLayout
from offload.devices.host_threads import kernel_pool

if TYPE_CHECKING:
    from offload.kv.table import BlockTable

Int64 = npt.NDArray[np.int64]


class Landmarks:
    """Sketches of the keys of every sealed block of a table, as it is kept.

    Attributes:
        columns: blocks of each sequence that they are known of.
    """

    def __init__(self) -> None:
        self.columns = 0
        self._layout = SketchLayout(0, 0)
        self._sketches = torch.empty(0, 0, 0, 0, dtype=torch.uint8)

    def largest_scores(self, query: torch.Tensor, into: torch.Tensor) -> None:
        """Write those of the first blocks to fp32 [sequences, heads, columns]; see `estimate_largest_scores`."""
        sketches = self._sketches[:, :, : into.shape[2]]
        estimate_largest_scores(query, sketches, self._layout, kernel_pool(), into)

    def add(self, table: BlockTable, column: int) -> None:
        """Those of a column's blocks, which are in memory. The caller holds the pool's lock."""
        assert column == self.columns
        layout = table.layouts.packed or table.layouts.plain
        self._layout = SketchLayout(layout.key_width, layout.block_tokens)
        self._reserve(table.sequences, layout.kv_heads, column + 1)
        blocks, rows = np.unique(table.all_blocks(column + 1)[:, column], return_inverse=True)
        found = []
        for block in blocks:
            keys, _ = read_tokens(table.pool.addresses[[block]], 0, layout.block_tokens, layout)
            found.append(sketch_blocks(keys, self._layout))
        self._sketches[:, :, column] = torch.stack(found)[rows]
        self.columns = column + 1

    def _reserve(self, sequences: int, heads: int, columns: int) -> None:
        room = self._sketches.shape[2]
        if self.columns == 0:
            room = 0
        if columns > room:
            # Twice what there was, so that growing copies each sketch a few times at most.
            shape = sequences, heads, max(columns, 2 * room, 16), self._layout.nbytes
            wider = torch.empty(shape, dtype=torch.uint8)
            if room:
                wider[:, :, : self.columns] = self._sketches[:, :, : self.columns]
            self._sketches = wider

    def cut(self, columns: int) -> None:
        """Forget all but the first so many blocks."""
        self.columns = min(self.columns, columns)

    def select(self, rows: Int64) -> None:
        """Those of some sequences."""
        if self.columns:
            self._sketches = self._sketches[torch.from_numpy(rows)]

    def copy(self) -> Landmarks:
        """The same, apart."""
        other = Landmarks()
        other.columns, other._layout, other._sketches = self.columns, self._layout, self._sketches.clone()
        return other
