"""A CUDA device: slabs in VRAM, copies on streams of their own, experts by the Triton kernels."""

from __future__ import annotations

import threading
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from offload.devices.base import Accelerator, ExpertBatch, ExpertSums, Slab, Span, Work
from offload.devices.cuda_driver import CopyStream, CudaDriver
from offload.devices.cuda_experts import CudaWork, sum_experts
from offload.devices.link import Link
from offload.devices.pinned import PinnedHostDevice, host_bytes
from offload.errors import DoesNotFitError, UnsupportedOperationError
from offload.moe.layer import ExpertsLayer
from offload.sizes import format_size
from offload.step_graph.graph import StepGraph

_PROBE_NBYTES = 32 << 20
_PROBES = 3
_LINK_LATENCY_S = 10e-6
_MEMORY_BYTES_PER_S = 300e9
"""What schedules assume of VRAM: that of a small card. Of all things it matters least to them."""


class CudaSlab(Slab):
    """VRAM out of torch's allocator; not addressable by the host."""

    def __init__(self, memory: torch.Tensor, driver: CudaDriver) -> None:
        self._memory: torch.Tensor | None = memory
        self._driver = driver
        self.nbytes = memory.numel()
        self.address = memory.data_ptr()

    def bytes(self) -> npt.NDArray[np.uint8]:
        """There are none that the host could address.

        Raises:
            UnsupportedOperationError: always.
        """
        raise UnsupportedOperationError("VRAM is not the host's memory; it is filled by copies")

    def span(self, offset: int, nbytes: int) -> Span:
        """A part of it as a tensor."""
        return self.tensor()[offset : offset + nbytes]

    def tensor(self) -> torch.Tensor:
        """The slab."""
        if self._memory is None:
            raise UnsupportedOperationError("this part of VRAM was given back")
        return self._memory

    def discard(self, offset: int, nbytes: int) -> None:
        """Give all of it back to the device; of a part nothing can be given."""
        if offset == 0 and nbytes >= self.nbytes and self._memory is not None:
            self._driver.synchronise()
            self._memory = None
            self._driver.trim()


class CudaDevice(Accelerator):
    """One GPU.

    Attributes:
        budget_nbytes: bytes of VRAM that slabs may take.
    """

    slab_nbytes = 256 << 20
    copy_threads = 2
    memory_bytes_per_s = _MEMORY_BYTES_PER_S

    def __init__(self, driver: CudaDriver, budget_nbytes: int) -> None:
        """Measure the link.

        Args:
            driver: of the device.
            budget_nbytes: see above; what torch needs beside is not in it.
        """
        self.driver = driver
        self.name = str(driver.device)
        self.budget_nbytes = budget_nbytes
        self._taken_nbytes = 0
        self._host = PinnedHostDevice(driver)
        self.link = self._measure_link()

    def host(self) -> PinnedHostDevice:
        """Pinned memory."""
        return self._host

    def allocate(self, nbytes: int) -> CudaSlab:
        """A slab of the budget.

        Raises:
            DoesNotFitError: the budget does not hold it, or the card has not so much free.
        """
        if self._taken_nbytes + nbytes > self.budget_nbytes:
            raise DoesNotFitError(
                f"{self.name}: a slab of {nbytes:,} bytes is beyond the {self.budget_nbytes:,} bytes that are left for "
                f"slabs, of which {self._taken_nbytes:,} are in use"
            )
        try:
            memory = self.driver.allocate(nbytes)
        except torch.OutOfMemoryError as error:
            free, total = self.driver.memory_nbytes()
            raise DoesNotFitError(
                f"{self.name}: no {format_size(nbytes)} of VRAM in one piece, {format_size(free)} of "
                f"{format_size(total)} are free; load with a smaller vram=, or end what else uses the GPU"
            ) from error
        self._taken_nbytes += nbytes
        return CudaSlab(memory, self.driver)

    def start_experts(self, layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor) -> Work:
        """Start kernels and the copy of their outputs to the host.

        Raises:
            torch.OutOfMemoryError: no room for activations.
        """
        return CudaWork(self.driver, layer, batch, hidden, out)

    def run_experts(self, layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Start and wait."""
        self.start_experts(layer, batch, hidden, out).finish()

    def synchronise(self) -> None:
        """Of all streams."""
        self.driver.synchronise()

    def finish_kernels(self) -> None:
        """Of the current stream."""
        self.driver.finish_kernels()

    def copy_reader(self) -> CudaCopyReader:
        """Copies on streams."""
        return CudaCopyReader(self.driver)

    def step_graph(self) -> StepGraph:
        """A CUDA graph.

        Raises:
            DeviceError: the driver lacks what a doorbell needs.
        """
        return self.driver.step_graph()

    def sum_experts(self, sums: ExpertSums) -> None:
        """Start kernels on the current stream."""
        sum_experts(sums)

    def _measure_link(self) -> Link:
        """What one stream of copies from pinned memory reaches."""
        source = self._host.allocate(_PROBE_NBYTES)
        target = self.driver.allocate(_PROBE_NBYTES)
        stream, seconds = self.driver.copy_stream(), []
        for _ in range(_PROBES):
            before = perf_counter()
            stream.copy(target, source.tensor())
            stream.synchronise()
            seconds.append(perf_counter() - before)
        return Link(_PROBE_NBYTES / max(min(seconds), 1e-9), _LINK_LATENCY_S)


class CudaCopyReader:
    """What a `ReadEngine` fills VRAM from: host memory, by address.

    Each of the engine's threads has a stream; a piece is done when its event is. Pieces of a few MiB keep the link
    busy as long as two are under way, and an urgent copy waits for no more than those.

    Attributes:
        paths, bytes_read, retries, direct: as of `LinkReader`.
    """

    def __init__(self, driver: CudaDriver) -> None:
        self.paths = (Path("host memory"),)
        self.bytes_read = 0
        self.retries = 0
        self.direct = True
        self._driver = driver
        self._thread = threading.local()
        self.renew_lock()

    def read(self, shard: int, offset: int, out: torch.Tensor) -> None:
        """Copy len(out) bytes from the address `offset`; returns when they are there."""
        del shard
        stream: CopyStream | None = getattr(self._thread, "stream", None)
        if stream is None:
            stream = self._thread.stream = self._driver.copy_stream()
        stream.copy(out, torch.from_numpy(host_bytes(offset, len(out))))
        stream.synchronise()
        with self._lock:
            self.bytes_read += len(out)

    def close(self) -> None:
        """Streams end with their threads."""

    def renew_lock(self) -> None:
        """In a forked child: the parent's threads hold no lock here."""
        self._lock = threading.Lock()
