"""What learns while a model runs, and is kept from one run to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Tables = Mapping[str, npt.NDArray[np.floating]]


@runtime_checkable
class Learner(Protocol):
    """Learns online."""

    def state(self) -> Tables:
        """What was learnt, by name."""
        ...

    def restore(self, state: Tables) -> None:
        """Go on from there.

        Raises:
            ValueError: it is of another model, or damaged; nothing was taken over.
        """
        ...


def check_tables(expected: Tables, found: Tables) -> None:
    """Whether `found` can take the place of `expected`.

    Raises:
        ValueError: names or shapes differ, or numbers are not finite.
    """
    if {name: table.shape for name, table in expected.items()} != {name: table.shape for name, table in found.items()}:
        raise ValueError("what was learnt is of another model: its tables have other names or shapes")
    if not all(np.isfinite(table).all() for table in found.values()):
        raise ValueError("what was learnt is damaged: it holds numbers that are not finite")
