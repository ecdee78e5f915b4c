"""The device seam: what the tiers and the MoE step ask of whatever computes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt


class Slab(ABC):
    """One large allocation of a tier, page-aligned.

    Attributes:
        nbytes: its size.
        address: of the first byte, as the device's kernels see it.
    """

    nbytes: int
    address: int

    @abstractmethod
    def bytes(self) -> npt.NDArray[np.uint8]:
        """The slab as uint8 [nbytes], writable, without a copy; what disk reads go into."""

    @abstractmethod
    def discard(self, offset: int, nbytes: int) -> None:
        """Give the memory of a page-aligned range back to the system; its content is lost, its address stays."""


class Device(ABC):
    """Where experts are computed and where their slots live."""

    name: str

    @abstractmethod
    def allocate(self, nbytes: int) -> Slab:
        """A slab of at least `nbytes` bytes.

        Raises:
            DoesNotFitError: the system refuses.
        """

    @abstractmethod
    def synchronise(self) -> None:
        """Return when all work given to the device is done."""
