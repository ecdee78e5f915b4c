"""What every way of attending to a part of a table is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from offload.kv.table import BlockTable

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]


class TableSparsity(ABC):
    """One table's: it is told what happens to the table, and attends in its place. Lossy.

    The table calls `sealed`, `cut`, `select` and `copy` while it holds the pool's lock.

    Attributes:
        watches_prompts: whether `watch` wants to see the queries of long passes.
    """

    watches_prompts: bool = False

    @abstractmethod
    def attend(
        self, table: BlockTable, query: torch.Tensor, scale: float, valid: Bool | None, sinks: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Attention of a few new tokens, which are in the table already.

        Args:
            table: the history.
            query: [B, Hq, T, key width] of its last T tokens.
            scale: of the scores.
            valid: bool [B, tokens, evicted ones too], False where a token is padding; None for none.
            sinks: [Hq], a score of each head that has no value; None for none.

        Returns:
            fp32 [B, Hq, T, value width]; None where all that the table holds is to be attended to.
        """

    def watch(  # noqa: B027 - top-k needs none
        self, table: BlockTable, query: torch.Tensor, scale: float, valid: Bool | None
    ) -> None:
        """See the queries of a long pass, whose tokens are in the table; arguments as of `attend`."""

    def sealed(self, table: BlockTable, column: int) -> None:  # noqa: B027 - not all care
        """A column's blocks, which are in memory, will stay as they are."""

    def cut(self, table: BlockTable) -> None:  # noqa: B027 - not all care
        """The table's last tokens were taken back."""

    def select(self, rows: Int64) -> None:  # noqa: B027 - not all care
        """The sequences are now those of some rows."""

    @abstractmethod
    def copy(self) -> TableSparsity:
        """One of a copied table."""
