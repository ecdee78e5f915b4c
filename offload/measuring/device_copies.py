"""Copies between host memory and a CUDA device as the runtime makes them."""

from __future__ import annotations

from time import perf_counter

from offload.devices.cuda import CudaDevice
from offload.devices.cuda_driver import PinRefusedError
from offload.devices.host import HostSlab
from offload.devices.link import CHUNK_NBYTES
from offload.devices.pinned import PinnedSlab
from offload.errors import DoesNotFitError
from offload.tiers.transfer import ReadEngine, ReadRequest, Urgency

MEMORY_NBYTES = 256 << 20
"""Of host memory that copies take in turn: more than the processor's caches hold."""
_PIECE_NBYTES = 256 << 20


class DeviceCopies:
    """Copies up are the `ReadEngine`'s, in pieces on some streams, as those of experts are. Copies down to locked
    memory are a stream's, those to pageable memory torch's, into memory that is new, as outputs come back in a step.

    Attributes:
        most_nbytes: of one copy.
    """

    def __init__(self, device: CudaDevice, *, threads: int | None = None, chunk_nbytes: int = CHUNK_NBYTES) -> None:
        """Take memory on both sides.

        Args:
            device: what copies go to. Where the system locks no memory, "pinned" copies are from what it gives instead.
            threads: that copy up; None for as many as the device's.
            chunk_nbytes: of a piece.
        """
        self.most_nbytes = MEMORY_NBYTES
        self._driver = device.driver
        self._above = device.allocate(MEMORY_NBYTES)
        self._below = {True: device.host().allocate(MEMORY_NBYTES), False: HostSlab(MEMORY_NBYTES)}
        for slab in self._below.values():
            # Pages that were never written are one page of zeros, which caches hold.
            slab.bytes()[:] = 1
        self._down = device.driver.copy_stream()
        self._engine = ReadEngine(
            device.copy_reader(), threads=threads or device.copy_threads, chunk_nbytes=chunk_nbytes
        )
        self._next = 0

    def copy(self, nbytes: int, count: int, *, up: bool, pinned: bool) -> float:
        """See `AcceleratorSubjects.copy`."""
        if not 0 < nbytes <= MEMORY_NBYTES:
            raise ValueError(f"copies of {nbytes:,} bytes: there are {MEMORY_NBYTES:,}")
        places = MEMORY_NBYTES // nbytes
        offsets = [(self._next + number) % places * nbytes for number in range(count)]
        self._next = (self._next + count) % places
        before = perf_counter()
        if up:
            self._copy_up(offsets, nbytes, pinned=pinned)
        else:
            self._copy_down(offsets, nbytes, pinned=pinned)
        return perf_counter() - before

    def _copy_up(self, offsets: list[int], nbytes: int, *, pinned: bool) -> None:
        source = self._below[pinned].address
        tickets = [
            self._engine.submit(
                ReadRequest(0, source + offset, self._above.span(offset, nbytes), None, "a copy"), Urgency.NOW
            )
            for offset in offsets
        ]
        self._engine.wait_all(tickets)
        for ticket in tickets:
            if ticket.error is not None:
                raise ticket.error

    def _copy_down(self, offsets: list[int], nbytes: int, *, pinned: bool) -> None:
        above, below = self._above.tensor(), self._below[True].tensor()
        for offset in offsets:
            source = above[offset : offset + nbytes]
            if pinned:
                self._down.copy(below[offset : offset + nbytes], source)
            else:
                # A new tensor: on a device that is the host's memory, `cpu` would copy nothing.
                source.to("cpu", copy=True)
        if pinned:
            self._down.synchronise()

    def lock_memory(self, nbytes: int) -> int:
        """See `AcceleratorSubjects.lock_memory`."""
        slabs: list[PinnedSlab] = []
        try:
            while (locked := sum(slab.nbytes for slab in slabs)) < nbytes:
                slabs.append(PinnedSlab(min(_PIECE_NBYTES, nbytes - locked), self._driver))
        except (PinRefusedError, DoesNotFitError):
            # Where that begins is what was asked.
            pass
        return min(nbytes, locked)

    def close(self) -> None:
        """End the threads and give the device's memory back; the host's goes with this object."""
        self._engine.close()
        self._above.discard(0, self._above.nbytes)
