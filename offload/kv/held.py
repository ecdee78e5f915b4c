"""Numbers of the blocks that a table refers to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


@dataclass
class Held:
    """Blocks that a table refers to.

    Attributes:
        blocks: int64 [sequences, room].
        columns: of it that are used.
        version: another one whenever other blocks are referred to.
    """

    blocks: Int64
    columns: int
    version: int = 0

    def reserve(self, columns: int) -> None:
        """Make room, twice what there was, so that growing copies each number a few times at most."""
        room = self.blocks.shape[1]
        if columns > room:
            wider = np.zeros((len(self.blocks), max(columns, 2 * room, 16)), np.int64)
            wider[:, : self.columns] = self.blocks[:, : self.columns]
            self.blocks = wider

    def add(self, column: list[int]) -> None:
        """One block more for each sequence; there must be room."""
        self.blocks[:, self.columns] = column
        self.columns += 1
        self.version += 1

    def put(self, rows: Int64, column: int, blocks: Int64) -> None:
        """Other blocks in a column of some rows."""
        self.blocks[rows, column] = blocks
        self.version += 1

    def cut(self, columns: int) -> Int64:
        """Keep the first so many columns; the blocks of the others, row after row."""
        left = np.ascontiguousarray(self.blocks[:, columns : self.columns]).reshape(-1)
        self.columns = min(self.columns, columns)
        self.version += 1
        return left

    def set(self, blocks: Int64) -> None:
        """Other blocks, [sequences, columns]."""
        self.blocks, self.columns = blocks.copy(), blocks.shape[1]
        self.version += 1

    def swap(self, other: Held) -> None:
        """Exchange what is referred to."""
        self.blocks, other.blocks = other.blocks, self.blocks
        self.columns, other.columns = other.columns, self.columns
        self.version, other.version = self.version + 1, other.version + 1
