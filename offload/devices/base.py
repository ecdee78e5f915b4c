"""The device seam: what the tiers and the MoE step ask of whatever computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from offload.moe.layer import ExpertsLayer


@dataclass(frozen=True)
class ExpertBatch:
    """Experts of one layer to compute, in place.

    Attributes:
        addresses: intp [n]; the bundle of each expert.
        offsets: int64 [n + 1]; the pairs of expert i are offsets[i] to offsets[i + 1].
        tokens: int64 [pairs]; the token that each pair reads.
        rows: int64 [pairs]; the output row that each pair writes, no row twice.
    """

    addresses: npt.NDArray[np.intp]
    offsets: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]


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
    def run_experts(self, layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """out[rows[p]] = expert(hidden[tokens[p]]) for every pair p, without routing weights.

        Args:
            layer: whose experts they are.
            batch: which experts, and their pairs.
            hidden: [T, H] contiguous, in the layer's dtype.
            out: fp32 [R, H] contiguous; rows that no pair names are left alone.
        """

    @abstractmethod
    def synchronise(self) -> None:
        """Return when all work given to the device is done."""
