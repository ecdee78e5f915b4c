"""Experts into shards: several threads fill buffers while another writes the one before."""

from __future__ import annotations

import errno
import itertools
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from offload.store import files
from offload.store.names import shard_file
from offload.store.progress import Progress
from offload.store.shards import Bundle, Chunk, Shard, chunks
from offload.store.source import BundleSource, ExpertGroup

BUFFERS = 3
CHUNK_NBYTES = 32 * 1024**2
# Disks are idle between the reads of one thread.
FILLERS = 6
_SOURCE_SHARE_OF_BUNDLE = 8
_SOURCE_NBYTES = 4 * 1024**2
# Where O_DIRECT is refused: how much may lie dirty in the page cache before it is written out and dropped.
DIRTY_NBYTES = 256 * 1024**2


def conversion_nbytes(groups: Sequence[ExpertGroup], chunk_nbytes: int | None = None) -> int:
    """Bytes of host memory that a conversion takes at most: buffers, and what its source needs in each thread.

    A source has the stored expert, up to eight times the size of its bundle, and a copy of what it reads. The header
    of one shard is not counted.

    Args:
        groups: the source's.
        chunk_nbytes: of one buffer; None for the size with which the disk is not waited for.
    """
    largest = max(group.layout.nbytes for group in groups)
    source_nbytes = FILLERS * (_SOURCE_SHARE_OF_BUNDLE * largest + _SOURCE_NBYTES)
    return BUFFERS * (chunk_nbytes or fitting_chunk_nbytes(groups, None)) + source_nbytes


def fitting_chunk_nbytes(groups: Sequence[ExpertGroup], memory_nbytes: int | None) -> int:
    """Bytes of one buffer: 32 MiB, or as much as the memory allows, and at least the largest bundle."""
    largest = max(group.layout.nbytes for group in groups)
    chunk_nbytes = min(CHUNK_NBYTES, sum(group.count * group.layout.nbytes for group in groups))
    if memory_nbytes is not None:
        spare_nbytes = memory_nbytes - conversion_nbytes(groups, largest)
        chunk_nbytes = min(chunk_nbytes, largest + spare_nbytes // BUFFERS)
    return max(chunk_nbytes, largest)


def write_shards(
    source: BundleSource, shards: Sequence[Shard], directory: Path, progress: Progress, buffer_nbytes: int
) -> list[int]:
    """Write all shards and make their bytes durable.

    Args:
        source: filled from in FILLERS threads, each expert once, started in order.
        shards: planned from the source's groups.
        directory: exists and holds none of the shards.
        progress: advanced by the bytes of bundles as they are written.
        buffer_nbytes: of each of BUFFERS buffers; no bundle is larger.

    Returns:
        xxh3_64 of every bundle, in order.

    Raises:
        StorageError: writing failed.
        Exception: whatever the source raises.
    """
    buffers = [files.aligned_buffer(buffer_nbytes) for _ in range(BUFFERS)]
    writer = ShardWriter(directory, shards)
    fillers = ThreadPoolExecutor(FILLERS, thread_name_prefix="store-filler")
    writers = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
    pending: deque[tuple[int, Future[None]]] = deque()
    checksums: list[int] = []

    def fill(bundle: Bundle, out: files.Bytes) -> int:
        source.fill_bundle(bundle.group, bundle.expert, out)
        return xxhash.xxh3_64_intdigest(out.data)

    def start(chunk: Chunk, buffer: files.Bytes) -> list[Future[int]]:
        ends = itertools.accumulate(bundle.nbytes for bundle in chunk.bundles)
        return [
            fillers.submit(fill, bundle, buffer[end - bundle.nbytes : end])
            for bundle, end in zip(chunk.bundles, ends, strict=True)
        ]

    def write(chunk: Chunk, buffer: files.Bytes, filled: list[Future[int]]) -> None:
        checksums.extend(future.result() for future in filled)
        writer.write(chunk, buffer)

    def wait() -> None:
        nbytes, future = pending.popleft()
        future.result()
        progress.advance(nbytes)

    try:
        for index, chunk in enumerate(chunks(shards, buffer_nbytes)):
            if len(pending) == BUFFERS:
                wait()
            # Chunks are written in order, so the buffer that came back last is the next in turn.
            buffer = buffers[index % BUFFERS][: chunk.nbytes]
            pending.append((chunk.nbytes, writers.submit(write, chunk, buffer, start(chunk, buffer))))
        while pending:
            wait()
        writers.submit(writer.finish_shard).result()
    finally:
        # Nobody may be left who fills a buffer, or who writes to a shard that is closed; a writer waits for fillers,
        # so theirs are not cancelled before it has ended.
        writers.shutdown(cancel_futures=True)
        fillers.shutdown(cancel_futures=True)
        writer.close()
    return checksums


class ShardWriter:
    """Writes the chunks of a plan in order; only one thread uses it at a time."""

    def __init__(self, directory: Path, shards: Sequence[Shard]) -> None:
        self._directory = directory
        self._shards = shards
        self._index = -1
        self._fd: int | None = None
        self._direct = True
        self._dirty_nbytes = 0

    def write(self, chunk: Chunk, buffer: files.Bytes) -> None:
        """Write a chunk from a page-aligned buffer, and open its shard where it is the first of it."""
        if chunk.shard != self._index:
            self.finish_shard()
            self._index = chunk.shard
            with files.storage_errors("writing", self._path):
                self._open()
        with files.storage_errors("writing", self._path):
            self._write(buffer, chunk.offset)

    def finish_shard(self) -> None:
        """Make the open shard's bytes durable and close it."""
        if self._fd is None:
            return
        with files.storage_errors("writing", self._path):
            self._flush()
            self.close()

    def close(self) -> None:
        """Close the open shard as it is."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    @property
    def _path(self) -> Path:
        return self._directory / shard_file(self._index, len(self._shards))

    def _open(self) -> None:
        """Create the shard with its header; the header's write shows whether O_DIRECT works here."""
        text = self._shards[self._index].header
        header = files.aligned_buffer(len(text))
        header[:] = np.frombuffer(text, dtype=np.uint8)
        flags = os.O_WRONLY | os.O_CREAT
        if self._direct:
            try:
                self._fd = files.open_file(self._path, flags | os.O_DIRECT)
                self._write(header, 0)
                return
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self.close()
                self._direct = False
        self._fd = files.open_file(self._path, flags)
        self._write(header, 0)

    def _write(self, data: files.Bytes, offset: int) -> None:
        assert self._fd is not None
        files.write_all(self._fd, data, offset)
        self._dirty_nbytes += data.nbytes
        if not self._direct and self._dirty_nbytes >= DIRTY_NBYTES:
            self._flush()

    def _flush(self) -> None:
        assert self._fd is not None
        files.fsync(self._fd)
        if not self._direct:
            files.drop_cache(self._fd)
        self._dirty_nbytes = 0
