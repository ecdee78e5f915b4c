"""Host memory that plays an accelerator's: a byte budget, and a link that everything has to cross.

Its experts are computed by the CPU kernels, on the copies in its own slots, so that a run on three tiers gives the bits
of a run on two, whatever is computed where.
"""

from __future__ import annotations

from bisect import bisect_right

import torch

from offload.devices.base import Accelerator, Device, ExpertBatch, Slab
from offload.devices.host import HostDevice
from offload.devices.link import Link, LinkReader
from offload.errors import DoesNotFitError
from offload.moe.layer import ExpertsLayer


class HostAccelerator(Accelerator):
    """An accelerator without a GPU.

    Attributes:
        budget_nbytes: bytes that slabs may take.
        link: from host memory.
        memory_bytes_per_s: speed at which its own memory is said to be read, for schedules; the CPU computes in fact.
    """

    name = "host"
    copy_threads = 1

    def __init__(self, budget_nbytes: int, link: Link, memory_bytes_per_s: float = 500e9) -> None:
        self.budget_nbytes = budget_nbytes
        self.link = link
        self.memory_bytes_per_s = memory_bytes_per_s
        self._host = HostDevice()
        self._taken_nbytes = 0
        self._starts: list[int] = []
        self._ends: list[int] = []

    def allocate(self, nbytes: int) -> Slab:
        """A slab of the budget.

        Raises:
            DoesNotFitError: the budget does not hold it.
        """
        if self._taken_nbytes + nbytes > self.budget_nbytes:
            raise DoesNotFitError(
                f"vram={self.budget_nbytes}: a slab of {nbytes:,} bytes does not fit, {self._taken_nbytes:,} are in use"
            )
        slab = self._host.allocate(nbytes)
        self._taken_nbytes += nbytes
        at = bisect_right(self._starts, slab.address)
        self._starts.insert(at, slab.address)
        self._ends.insert(at, slab.address + slab.nbytes)
        return slab

    def run_experts(self, layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """With the CPU kernels; returns when done.

        Raises:
            ValueError: a bundle that is not in this device's memory, which a real accelerator could not read.
        """
        for address in batch.addresses.tolist():
            at = bisect_right(self._starts, address) - 1
            if at < 0 or address + layer.layout.nbytes > self._ends[at]:
                raise ValueError(f"{layer.name}: an expert at address {address:#x} is not in the accelerator's memory")
        self._host.run_experts(layer, batch, hidden, out)

    def copy_reader(self) -> LinkReader:
        """Copies that take as long as the link would."""
        return LinkReader(self.link)

    def finish_kernels(self) -> None:
        """The CPU's kernels are done when they return."""

    def host(self) -> Device:
        """Plain host memory."""
        return self._host

    def synchronise(self) -> None:
        """Nothing runs on after a call."""
