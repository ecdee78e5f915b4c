"""Tokens that a table does not hold any more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Evicted:
    """What has gone out of the front of a table.

    Attributes:
        tokens: of each sequence.
        valid: bool [sequences, kept]: of the table's first tokens, among which some are missing, False where one is
            padding. Those that follow are all there.
    """

    tokens: int
    valid: Bool

    @property
    def kept(self) -> int:
        """Tokens among which some are missing; a table cannot be cropped to fewer."""
        return int(self.valid.shape[1])

    def held(self, valid: Bool) -> Bool:
        """Of a mask over all tokens [sequences, S], what belongs to those that the table holds."""
        return np.ascontiguousarray(np.concatenate([self.valid, valid[:, self.kept + self.tokens :]], 1))

    def select(self, rows: Int64) -> Evicted:
        """That of some sequences."""
        return Evicted(self.tokens, self.valid[rows])
