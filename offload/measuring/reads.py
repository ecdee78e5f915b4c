"""Reads of random places of a scratch file through the runtime's own reader and engine."""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import xxhash

from formats.packed import round_up
from offload.devices.host import HostSlab
from offload.tiers.disk import ShardReader
from offload.tiers.transfer import ReadEngine, ReadRequest, Urgency
from placement.planner import READ_CHUNK_NBYTES

SCRATCH_NBYTES = 512 << 20
_HUGE_PAGE_NBYTES = 2 << 20


class Scratch:
    """A file of random bytes on the disk to be measured; a context manager that removes it."""

    def __init__(self, directory: Path, nbytes: int = SCRATCH_NBYTES) -> None:
        """Write it.

        Raises:
            OSError: the directory cannot be written.
        """
        self._directory = TemporaryDirectory(prefix=".offload-profile-", dir=directory)
        self.path = Path(self._directory.name) / "scratch"
        self._slab: HostSlab | None = None
        self._block = np.random.default_rng(1).integers(0, 256, 4 << 20, dtype=np.uint8)
        try:
            with open(self.path, "wb", buffering=0) as file:
                for _ in range(nbytes // len(self._block)):
                    file.write(self._block.data)
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except BaseException:
            self._directory.cleanup()
            raise
        self.nbytes = nbytes // len(self._block) * len(self._block)

    def read(self, block_nbytes: int, in_flight: int, blocks: int) -> float:
        """Seconds to read and check blocks at random places, large ones in pieces as the runtime reads bundles.

        Raises:
            StorageError, StoreCorruptError: the disk failed, or gave other bytes than were written.
        """
        size = round_up(block_nbytes, mmap.PAGESIZE)
        reader = ShardReader([self.path], self._open)
        engine = ReadEngine(reader, threads=in_flight, chunk_nbytes=min(size, READ_CHUNK_NBYTES))
        slab = self._memory(size * blocks)
        places = random.Random(blocks).choices(range((self.nbytes - size) // mmap.PAGESIZE), k=blocks)
        try:
            requests = [self._request(place * mmap.PAGESIZE, size, slab, number) for number, place in enumerate(places)]
            before = perf_counter()
            tickets = [engine.submit(request, Urgency.NOW) for request in requests]
            engine.wait_all(tickets)
            seconds = perf_counter() - before
        finally:
            engine.close()
        for ticket in tickets:
            if ticket.error is not None:
                raise ticket.error
        return seconds

    def _memory(self, nbytes: int) -> HostSlab:
        """So much memory, the same for all reads. Touched: what counts is the disk, and slots are there already."""
        if self._slab is None or self._slab.nbytes < nbytes:
            # Slots lie in huge pages, without which a read takes many times as long.
            self._slab = HostSlab(round_up(nbytes, _HUGE_PAGE_NBYTES))
            self._slab.bytes()[:] = 0
        return self._slab

    def _open(self, _index: int, direct: bool) -> int:
        return os.open(self.path, os.O_RDONLY | (os.O_DIRECT if direct else 0))

    def _request(self, offset: int, size: int, slab: HostSlab, number: int) -> ReadRequest:
        out = memoryview(slab.bytes()[number * size : (number + 1) * size])  # type: ignore[arg-type]
        return ReadRequest(0, offset, out, self._checksum(offset, size), "scratch")

    def _checksum(self, offset: int, size: int) -> int:
        """Of bytes that repeat in blocks."""
        length = len(self._block)
        digest = xxhash.xxh3_64()
        while size:
            start = offset % length
            part = min(size, length - start)
            digest.update(self._block[start : start + part].data)
            offset, size = offset + part, size - part
        return digest.intdigest()

    def close(self) -> None:
        """Remove the file."""
        self._directory.cleanup()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
