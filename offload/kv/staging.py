"""Memory through which blocks on disk pass: read ahead, attended, forgotten."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from time import perf_counter
from typing import NamedTuple

from offload.devices.base import Device
from offload.kv.slots import RamSlots, view
from offload.tiers.direct_engine import make_engine
from offload.tiers.disk import ShardReader
from offload.tiers.transfer import Completion, ReadRequest, Urgency
from placement.kv_settings import READ_NBYTES, READS_IN_FLIGHT

_FIX = "the disk changed what was written to it: check it, or load with nvme= on another"


class _Started(NamedTuple):
    address: int
    buffer_nbytes: int
    tickets: list[Completion]


class Staging:
    """Buffers out of one budget. One thread at a time uses it: the pool's lock.

    Attributes:
        budget_nbytes: memory of all buffers, at most.
        stall_s: seconds that `fetch` waited.
    """

    def __init__(self, device: Device, reader: ShardReader) -> None:
        """Nothing is allocated before the first read.

        Args:
            device: whose memory.
            reader: of the file; closed with the buffers.
        """
        self.stall_s = 0.0
        self._slots = RamSlots(device, 0)
        self._started: dict[Hashable, _Started] = {}
        self._engine = make_engine(reader, threads=READS_IN_FLIGHT, chunk_nbytes=READ_NBYTES)

    @property
    def budget_nbytes(self) -> int:
        """See above."""
        return self._slots.budget_nbytes

    @budget_nbytes.setter
    def budget_nbytes(self, nbytes: int) -> None:
        self._slots.budget_nbytes = nbytes

    @property
    def bytes_read(self) -> int:
        """Bytes that arrived."""
        return self._engine.reader.bytes_read

    @property
    def reader(self) -> ShardReader:
        """What is read from."""
        reader = self._engine.reader
        assert isinstance(reader, ShardReader)
        return reader

    @property
    def is_busy(self) -> bool:
        """Whether anything is on its way or here."""
        return bool(self._started)

    def is_started(self, key: Hashable) -> bool:
        """Whether blocks of that name are on their way or here."""
        return key in self._started

    def has_arrived(self, key: Hashable) -> bool:
        """Whether `fetch` would not wait."""
        started = self._started.get(key)
        return started is not None and all(ticket.finished for ticket in started.tickets)

    def start(
        self, key: Hashable, offsets: Sequence[int], checksums: Sequence[int], nbytes: int, buffer_nbytes: int
    ) -> bool:
        """Begin to read blocks into a buffer, one after the other; False where there is no room for it.

        Args:
            key: names them.
            offsets: where each lies in the file.
            checksums: of each.
            nbytes: of one block.
            buffer_nbytes: size of the buffer, the same for all that may take each other's place.
        """
        address = self._slots.take(buffer_nbytes)
        if address is None:
            return False
        tickets: list[Completion] = []
        self._started[key] = _Started(address, buffer_nbytes, tickets)
        first = 0
        for end in range(1, len(offsets) + 1):
            if end < len(offsets) and offsets[end] == offsets[end - 1] + nbytes:
                continue
            out = view(address + first * nbytes, (end - first) * nbytes)
            request = ReadRequest(0, offsets[first], out, tuple(checksums[first:end]), "KV blocks", _FIX)
            tickets.append(self._engine.submit(request, Urgency.SOON))
            first = end
        return True

    def fetch(self, key: Hashable) -> int:
        """Wait for blocks; returns the address of the first, and the others follow.

        Raises:
            StorageError, StoreCorruptError: they cannot be read; they still have to be dropped.
            ClosedError: the engine was closed.
        """
        address, _, tickets = self._started[key]
        if not all(ticket.finished for ticket in tickets):
            before = perf_counter()
            for ticket in tickets:
                self._engine.promote(ticket)
            self._engine.wait_all(tickets)
            self.stall_s += perf_counter() - before
        for ticket in tickets:
            if not ticket.succeeded:
                raise ticket.error or RuntimeError("a read of KV blocks was cancelled")
        return address

    def drop(self, key: Hashable) -> None:
        """Blocks are not needed any more, or not at all; waits for reads that are running."""
        address, buffer_nbytes, tickets = self._started.pop(key)
        for ticket in tickets:
            self._engine.cancel(ticket)
        self._engine.wait_all(tickets)
        self._slots.give(address, buffer_nbytes)

    def drop_all(self, but: Collection[Hashable] = ()) -> None:
        """Forget all blocks, except those of some names."""
        for key in [key for key in self._started if key not in but]:
            self.drop(key)

    def close(self) -> None:
        """Stop reading, close the file's descriptors, free the memory. May be called again."""
        self._engine.close()
        self._started.clear()
        self._slots.release_memory()
