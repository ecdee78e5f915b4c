"""Tokens that a table does not hold any more."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]


@dataclass
class Evicted:
    """What has gone out of the front of a table.

    Attributes:
        tokens: of each sequence.
        valid: bool [sequences, kept]: of the table's first tokens, among which some are missing, False where one is
            padding. Those that follow are all there.
    """

    tokens: int
    valid: Bool
    _memory: Bool | None = field(default=None, repr=False, compare=False)

    @property
    def kept(self) -> int:
        """Tokens among which some are missing; a table cannot be cropped to fewer."""
        return int(self.valid.shape[1])

    def held(self, valid: Bool) -> Bool:
        """Of a mask over all tokens [sequences, S], what belongs to those that the table holds, in memory that the next
        call writes to; its rows are contiguous.
        """
        kept, held = self.kept, valid.shape[1] - self.tokens
        if self._memory is None or self._memory.shape[1] < held:
            # Twice what is needed, so that growing allocates a few times at most.
            self._memory = np.empty((len(valid), 2 * held), np.bool_)
            self._memory[:, :kept] = self.valid
        self._memory[:, kept:held] = valid[:, kept + self.tokens :]
        return self._memory[:, :held]

    def select(self, rows: Int64) -> Evicted:
        """That of some sequences."""
        return Evicted(self.tokens, self.valid[rows])

    def copy(self) -> Evicted:
        """The same, apart."""
        return Evicted(self.tokens, self.valid)
