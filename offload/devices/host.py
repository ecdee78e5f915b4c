"""The device that needs no accelerator: plain host memory, computed on by the CPU kernels."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import numpy.typing as npt
import torch

from formats.packed import round_up
from offload.devices.base import Device, ExpertBatch, Slab
from offload.devices.host_experts import run_experts
from offload.errors import DoesNotFitError
from offload.moe.layer import ExpertsLayer


class HostSlab(Slab):
    """Private anonymous memory in transparent huge pages where the system has them.

    Not touched when made: a page takes memory when the first expert is read into it. Freed when the last view of
    it is gone.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = round_up(nbytes, mmap.PAGESIZE)
        try:
            self._memory = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise DoesNotFitError(
                f"the system refused {self.nbytes:,} bytes of host memory ({error.strerror}); lower ram= or free memory"
            ) from error
        # First touch in 4 KiB pages runs at 1-2 GB/s, in huge pages at 7-8; a kernel without them refuses the advice.
        with contextlib.suppress(OSError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(self._memory, dtype=np.uint8)
        self.address = int(self._bytes.ctypes.data)

    def bytes(self) -> npt.NDArray[np.uint8]:
        """The slab as uint8 [nbytes]."""
        return self._bytes

    def discard(self, offset: int, nbytes: int) -> None:
        """Give the pages of a range back; they read as zeros afterwards."""
        self._memory.madvise(mmap.MADV_DONTNEED, offset, nbytes)


class HostDevice(Device):
    """Host memory and the CPU kernels."""

    name = "host"

    def allocate(self, nbytes: int) -> HostSlab:
        """A slab of host memory."""
        return HostSlab(nbytes)

    def run_experts(self, layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """On the calling thread and the kernels' workers; returns when done."""
        run_experts(layer, batch, hidden, out)

    def synchronise(self) -> None:
        """CPU kernels return when they are done: nothing to wait for."""
