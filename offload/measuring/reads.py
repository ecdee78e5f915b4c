"""Reads of random places of files through the runtime's own reader and engine.

Which places counts: what was read a moment ago, or just written, may lie in the memory of a virtual machine's host,
which direct reads do not go around, and comes at twice to thirty times the speed of what was not. A model's reads are
mostly of what it read before. So what is measured lies in places that are read once first.
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from formats.packed import round_up
from offload.devices.host import HostSlab
from offload.tiers.direct_engine import DirectEngine, make_engine
from offload.tiers.disk import ShardReader
from offload.tiers.read_queue import ReadRequest
from offload.tiers.transfer import Urgency
from placement.planner import READ_CHUNK_NBYTES, READER_THREADS

SCRATCH_NBYTES = 512 << 20
_PART_NBYTES = 32 << 20
"""Twice and more as large as the largest reads."""
_FIRST_AT_ONCE = 24
"""Reads of parts for which there is memory at a time."""
_HUGE_PAGE_NBYTES = 2 << 20


class _Part(NamedTuple):
    """Bytes of a file that are read."""

    file: int
    start: int
    nbytes: int


class BlockReads(Protocol):
    """Files on the disk to be measured."""

    def read(self, block_nbytes: int, in_flight: int, blocks: int) -> float:
        """Seconds to read that many blocks at random places."""
        ...

    def read_first(self, nbytes: int) -> float:
        """Bytes per second of reading so much for the first time, in which all reads lie from then on."""
        ...


class FileReads:
    """Files that are there, such as a store's shards; only read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Look at their sizes.

        Raises:
            OSError: a file is not there.
        """
        self.paths = tuple(paths)
        self._sizes = [path.stat().st_size for path in self.paths]
        self._slab: HostSlab | None = None
        # Not seeded: places that an earlier measurement read may be in a host's memory since.
        self._random = random.Random()
        self._parts = [_Part(index, 0, nbytes) for index, nbytes in enumerate(self._sizes)]

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(self._sizes)

    def read(self, block_nbytes: int, in_flight: int, blocks: int) -> float:
        """Seconds to read and hash blocks at random places, large ones in pieces as the runtime reads bundles.

        Args:
            block_nbytes: of each, rounded up to pages; no more than the largest file has, or part of it that is read.
            in_flight: reads at once.
            blocks: how many.

        Raises:
            StorageError, StoreCorruptError: the disk failed, or gave other bytes than are known to be there.
            ValueError: no file is as large as a block.
        """
        size = round_up(block_nbytes, mmap.PAGESIZE)
        return self._read(self._places(size, blocks), size, in_flight)

    def read_first(self, nbytes: int) -> float:
        """Bytes per second of reading parts of the files, which are those that `read` reads from then on.

        Args:
            nbytes: of all parts; all of them where files have less.

        Raises:
            StorageError, StoreCorruptError: as `read`.
        """
        self._parts = self._parts_of(nbytes)
        most = max(part.nbytes for part in self._parts)
        size = min(READ_CHUNK_NBYTES, most // mmap.PAGESIZE * mmap.PAGESIZE)
        places = [
            (part.file, start)
            for part in self._parts
            for start in range(part.start, part.start + part.nbytes - size + 1, size)
        ]
        seconds = 0.0
        for at in range(0, len(places), _FIRST_AT_ONCE):
            seconds += self._read(places[at : at + _FIRST_AT_ONCE], size, READER_THREADS)
        return len(places) * size / seconds

    def _parts_of(self, nbytes: int) -> list[_Part]:
        """Random parts of files, no two of which overlap, with so many bytes together."""
        parts = [
            _Part(index, start, min(_PART_NBYTES, size - start))
            for index, size in enumerate(self._sizes)
            for start in range(0, size, _PART_NBYTES)
            # What is left of a file is too small for the largest reads.
            if start == 0 or size - start >= _PART_NBYTES
        ]
        self._random.shuffle(parts)
        kept: list[_Part] = []
        for part in parts:
            if sum(one.nbytes for one in kept) >= nbytes:
                break
            kept.append(part)
        return kept

    def _read(self, places: Sequence[tuple[int, int]], size: int, in_flight: int) -> float:
        reader = ShardReader(self.paths, self._open)
        engine = make_engine(reader, threads=in_flight, chunk_nbytes=min(size, READ_CHUNK_NBYTES))
        compiled = isinstance(engine, DirectEngine)
        slab = self._memory(size * len(places))
        try:
            requests = [
                self._request(file, offset, slab.bytes()[number * size : (number + 1) * size], compiled)
                for number, (file, offset) in enumerate(places)
            ]
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

    def _places(self, size: int, blocks: int) -> list[tuple[int, int]]:
        """(file, offset of a page) of each block, every place as probable as any other."""
        starts = [max(0, (part.nbytes - size) // mmap.PAGESIZE + 1) for part in self._parts]
        if not any(starts):
            raise ValueError(f"no file of {self.paths} has {size:,} bytes")
        chosen = self._random.choices(range(len(starts)), weights=starts, k=blocks)
        return [
            (self._parts[one].file, self._parts[one].start + self._random.randrange(starts[one]) * mmap.PAGESIZE)
            for one in chosen
        ]

    def _memory(self, nbytes: int) -> HostSlab:
        """So much memory, the same for all reads. Touched: what counts is the disk, and slots are there already."""
        if self._slab is None or self._slab.nbytes < nbytes:
            # Slots lie in huge pages, without which a read takes many times as long.
            self._slab = HostSlab(round_up(nbytes, _HUGE_PAGE_NBYTES))
            self._slab.bytes()[:] = 0
        return self._slab

    def _open(self, index: int, direct: bool) -> int:
        return os.open(self.paths[index], os.O_RDONLY | (os.O_DIRECT if direct else 0))

    def _request(self, file: int, offset: int, place: npt.NDArray[np.uint8], compiled: bool) -> ReadRequest:
        label = str(self.paths[file])
        return _Hashed(file, offset, memoryview(place), 0 if compiled else (), label)  # type: ignore[arg-type]


class _Hashed(ReadRequest):
    """A request that is hashed as a bundle is, though nobody knows what its bytes should be: with a checksum, however
    wrong, by a compiled reader, which then asks; else when a reader in Python asks.
    """

    def wrong_part(self, arrived: memoryview) -> None:
        """Nothing is known to be wrong."""
        if self.checksum == ():
            xxhash.xxh3_64_intdigest(arrived)


class Scratch(FileReads):
    """A file of random bytes, written to be read and checked; a context manager that removes it."""

    def __init__(self, directory: Path, nbytes: int = SCRATCH_NBYTES) -> None:
        """Write it.

        Raises:
            OSError: the directory cannot be written.
        """
        self._directory = TemporaryDirectory(prefix=".offload-profile-", dir=directory)
        path = Path(self._directory.name) / "scratch"
        self._block = np.random.default_rng(1).integers(0, 256, 4 << 20, dtype=np.uint8)
        try:
            with open(path, "wb", buffering=0) as file:
                for _ in range(nbytes // len(self._block)):
                    file.write(self._block.data)
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            super().__init__([path])
        except BaseException:
            self._directory.cleanup()
            raise

    def _request(self, file: int, offset: int, place: npt.NDArray[np.uint8], compiled: bool) -> ReadRequest:
        return ReadRequest(file, offset, memoryview(place), self._checksum(offset, len(place)), "scratch")  # type: ignore[arg-type]

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
