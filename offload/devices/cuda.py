"""A CUDA device: slabs in VRAM, copies on streams of their own, experts and attention by the Triton kernels."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from formats.kv import KvLayout
from offload.devices import cuda_attention
from offload.devices.base import (
    AttentionBatch,
    AttentionWork,
    ExpertBatch,
    ExpertSums,
    KvAccelerator,
    Slab,
    Span,
    Work,
)
from offload.devices.cuda_attention import CudaAttention
from offload.devices.cuda_driver import CopyStream, CudaDriver, Moment
from offload.devices.cuda_experts import CudaWork, sum_experts, warm_up
from offload.devices.cuda_tiles import tune
from offload.devices.link import CHUNK_NBYTES, Link
from offload.devices.pinned import PinnedHostDevice, host_bytes
from offload.errors import DoesNotFitError, UnsupportedOperationError
from offload.moe.layer import ExpertsLayer
from offload.request import store_root
from offload.sizes import format_size
from offload.step_graph.graph import StepGraph
from offload.store.progress import Progress
from offload.tiers.transfer import ReadEngine, ReadRequest, Urgency

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


class CudaDevice(KvAccelerator):
    """One GPU.

    Attributes:
        budget_nbytes: bytes of VRAM that slabs may take.
    """

    slab_nbytes = 256 << 20
    # With two, an H100 had 22 of 54 GB/s: of a piece's 190 us 40 were the link's.
    copy_threads = 4
    joins_segments = True
    memory_bytes_per_s = _MEMORY_BYTES_PER_S

    def __init__(self, driver: CudaDriver, budget_nbytes: int, claim_nbytes: int | None = None) -> None:
        """Claim memory and measure the link.

        Args:
            driver: of the device.
            budget_nbytes: see above; what torch needs beside is not in it.
            claim_nbytes: what torch may take for this device until `release`, what is beside slabs too; None for no
                bound.

        Raises:
            torch.OutOfMemoryError: no room for the copies that are measured; nothing stays claimed.
            Whatever a copy that fails raises.
        """
        self.driver = driver
        self.name = str(driver.device)
        self.budget_nbytes = budget_nbytes
        self._taken_nbytes = 0
        self._slabs: tuple[CudaSlab, ...] = ()
        self._written: Moment | None = None
        self._host = PinnedHostDevice(driver)
        self._claim = None if claim_nbytes is None else driver.claims.claim(claim_nbytes)
        try:
            self.link = self._measure_link()
        except BaseException:
            self.release()
            raise

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
        slab = CudaSlab(memory, self.driver)
        # Another tuple each time: threads that copy look into it.
        self._slabs = tuple(sorted((*self._slabs, slab), key=lambda one: one.address))
        return slab

    def memory(self, address: int, nbytes: int) -> torch.Tensor:
        """Bytes of this device's slabs as uint8 [nbytes], without a copy.

        Raises:
            ValueError: they are in none.
        """
        slabs = self._slabs
        at = bisect_right(slabs, address, key=lambda slab: slab.address) - 1
        if at < 0 or address + nbytes > slabs[at].address + slabs[at].nbytes:
            raise ValueError(f"{nbytes:,} bytes at address {address:#x} are not in the memory of {self.name}")
        start = address - slabs[at].address
        return slabs[at].tensor()[start : start + nbytes]

    def start_experts(self, layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor) -> Work:
        """Start kernels and the copy of their outputs to the host.

        Raises:
            torch.OutOfMemoryError: no room for activations.
        """
        return CudaWork(self.driver, layer, batch, hidden, out)

    def prepare(self, layers: Sequence[ExpertsLayer], most_pairs: int, progress: Progress) -> None:
        """See `Accelerator.prepare`; what stands for a GPU in tests compiles nothing."""
        if self.driver.device.type != "cuda":
            return
        progress.start(0, "Preparing kernels of the device: compiled and timed the first time, then kept")
        try:
            tune(self.driver, layers, most_pairs, store_root(None) / "tiles")
            warm_up(self.driver, layers, most_pairs)
        finally:
            progress.finish()

    def release(self) -> None:
        """Give back what torch was allowed to take; all of the card is torch's again when nobody claims any of it."""
        if self._claim is not None:
            self._claim.release()

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

    # --- blocks of a KV cache ----------------------------------------------------------------------------------

    def start_attention(self, batch: AttentionBatch) -> AttentionWork:
        """Start the kernel on the current stream.

        Raises:
            torch.OutOfMemoryError: no room for queries and outputs.
        """
        return CudaAttention(self.driver, batch)

    def read_blocks(
        self, addresses: npt.NDArray[np.int64], tokens: int, layout: KvLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """On the device.

        Raises:
            ValueError: a block that is not in this device's memory.
            torch.OutOfMemoryError: no room for them in fp32.
        """
        return cuda_attention.read_blocks(self._blocks(addresses, layout), tokens, layout)

    def write_tokens(
        self,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        offsets: npt.NDArray[np.int64],
        addresses: npt.NDArray[np.int64],
        first_tokens: npt.NDArray[np.int64],
        layout: KvLayout,
    ) -> None:
        """Start the kernel on the current stream.

        Raises:
            ValueError: see `gpu_kernels.kv_blocks.write_tokens`.
        """
        cuda_attention.write_tokens(self.driver, keys, values, (offsets, addresses, first_tokens), layout)
        self._note_written()

    def pack_blocks(
        self,
        sources: npt.NDArray[np.int64],
        source_layout: KvLayout,
        targets: npt.NDArray[np.int64],
        layout: KvLayout,
    ) -> None:
        """Start torch's operations on the current stream.

        Raises:
            ValueError: a block that is not in this device's memory.
            torch.OutOfMemoryError: no room for them in fp32.
        """
        cuda_attention.pack_blocks(
            self._blocks(sources, source_layout), source_layout, self._blocks(targets, layout), layout
        )
        self._note_written()

    def copy_up(self, source: npt.NDArray[np.uint8], target: int) -> None:
        """On the current stream; returns when the bytes are there.

        Raises:
            ValueError: the target is not in this device's memory.
        """
        self.memory(target, source.nbytes).copy_(torch.from_numpy(source))
        self._note_written()

    def copy_within(self, source: int, target: int, nbytes: int) -> None:
        """On the current stream.

        Raises:
            ValueError: source or target is not in this device's memory.
        """
        self.memory(target, nbytes).copy_(self.memory(source, nbytes))
        self._note_written()

    def copy_down_reader(self) -> CudaDownReader:
        """Copies on streams, each behind what was written to blocks before it."""
        return CudaDownReader(self)

    def written(self) -> Moment | None:
        """When blocks were last written to; None before the first time."""
        return self._written

    def _note_written(self) -> None:
        self._written = self.driver.moment()

    def _blocks(self, addresses: npt.NDArray[np.int64], layout: KvLayout) -> list[torch.Tensor]:
        return [self.memory(address, layout.nbytes) for address in addresses.tolist()]

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
        """What copies from pinned memory reach as the runtime makes them, which schedules have to count with."""
        source = self._host.allocate(_PROBE_NBYTES)
        target = self.driver.allocate(_PROBE_NBYTES)
        engine, seconds = ReadEngine(self.copy_reader(), threads=self.copy_threads, chunk_nbytes=CHUNK_NBYTES), []
        try:
            for _ in range(_PROBES):
                before = perf_counter()
                ticket = engine.submit(ReadRequest(0, source.address, target, None, "a probe"), Urgency.NOW)
                engine.wait_all([ticket])
                seconds.append(perf_counter() - before)
                if ticket.error is not None:
                    raise ticket.error
        finally:
            engine.close()
        return Link(_PROBE_NBYTES / max(min(seconds), 1e-9), _LINK_LATENCY_S)


class _StreamReader:
    """Copies between the host's memory and a device's, by address.

    Each of the engine's threads has a stream; a piece is done when its event is. Pieces of a few MiB keep the link
    busy as long as enough are under way to make up for what starting one and hearing of its end take, and an urgent
    copy waits for no more than those.

    Attributes:
        paths, bytes_read, retries, direct: as of `LinkReader`.
    """

    def __init__(self, driver: CudaDriver, source: str) -> None:
        self.paths = (Path(source),)
        self.bytes_read = 0
        self.retries = 0
        self.direct = True
        self._driver = driver
        self._thread = threading.local()
        self.renew_lock()

    def _copy(self, target: torch.Tensor, source: torch.Tensor, after: Moment | None = None) -> None:
        """Copy uint8 [n]; returns when they are there."""
        stream: CopyStream | None = getattr(self._thread, "stream", None)
        if stream is None:
            stream = self._thread.stream = self._driver.copy_stream()
        if after is not None:
            stream.follow(after)
        stream.copy(target, source)
        stream.synchronise()
        with self._lock:
            self.bytes_read += len(target)

    def close(self) -> None:
        """Streams end with their threads."""

    def renew_lock(self) -> None:
        """In a forked child: the parent's threads hold no lock here."""
        self._lock = threading.Lock()


class CudaCopyReader(_StreamReader):
    """What a `ReadEngine` fills VRAM from: host memory, by address."""

    def __init__(self, driver: CudaDriver) -> None:
        super().__init__(driver, "host memory")

    def read(self, shard: int, offset: int, out: torch.Tensor) -> None:
        """Copy len(out) bytes from the address `offset`; returns when they are there."""
        del shard
        self._copy(out, torch.from_numpy(host_bytes(offset, len(out))))


class CudaDownReader(_StreamReader):
    """What a `ReadEngine` fills host memory from: VRAM, by address, as kernels left it."""

    def __init__(self, device: CudaDevice) -> None:
        super().__init__(device.driver, device.name)
        self._device = device

    def read(self, shard: int, offset: int, out: memoryview) -> None:
        """Copy len(out) bytes from the address `offset`; returns when they are there.

        Raises:
            ValueError: they are not in the device's memory.
        """
        del shard
        target = torch.from_numpy(np.frombuffer(out, np.uint8))
        self._copy(target, self._device.memory(offset, len(out)), self._device.written())
