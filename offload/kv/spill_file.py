"""The file that blocks go to when they leave memory: without a name, so that it ends with the process."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from offload.errors import ClosedError, StorageError
from offload.store.files import FIXES
from offload.tiers.disk import RETRIED, RETRY_PAUSE_S, Preadv, ShardReader

EXTENT_BLOCKS = 64
"""Blocks of one layer that lie one after the other, as many as a segment has, so that reading a layer's history is long
reads."""

WRITE_ATTEMPTS = 4


@dataclass
class _Extent:
    """EXTENT_BLOCKS blocks of one size and owner, from `start` on.

    Attributes:
        used: of them, those that are taken.
    """

    start: int
    owner: int
    nbytes: int
    used: int


Pwrite = Callable[[int, memoryview, int], int]


class SpillFile:
    """Space for blocks in an unnamed file of a directory. Writes from any number of threads; the rest from one.

    Attributes:
        directory: where it is.
        nbytes: length of the file.
        bytes_written: by `write`.
        write_retries: writes that failed or fell short and were repeated.
    """

    def __init__(self, directory: Path, *, pwrite: Pwrite = os.pwrite, preadv: Preadv = os.preadv) -> None:
        """Create the file.

        Args:
            directory: made where it is missing.
            pwrite: the system call.
            preadv: the system call.

        Raises:
            StorageError: the directory cannot be written to.
        """
        self.directory = directory
        self.nbytes = 0
        self.bytes_written = 0
        self.write_retries = 0
        self._pwrite = pwrite
        self._preadv = preadv
        self._lock = threading.Lock()
        self._free: dict[tuple[int, int], list[int]] = {}
        self._empty: dict[int, list[int]] = {}
        self._extents: dict[int, _Extent] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = _unnamed(directory)
        except OSError as error:
            raise self._error(error, "creating a file for KV blocks") from error
        self._descriptor = self._direct_descriptor()

    @property
    def descriptor(self) -> int:
        """The open file; -1 after `close()`."""
        return self._file

    def reader(self) -> ShardReader:
        """A reader of the file, as its shard 0."""
        return ShardReader([self.directory / "kv-blocks"], self._open, preadv=self._preadv)

    def take(self, owner: int, nbytes: int) -> int:
        """The offset of space for a block.

        Args:
            owner: one sequence of one layer; its blocks lie together.
            nbytes: a multiple of 4 KiB.
        """
        free = self._free.setdefault((owner, nbytes), [])
        if not free:
            empty = self._empty.get(nbytes)
            start = empty.pop() if empty else self.nbytes
            if start == self.nbytes:
                self.nbytes += EXTENT_BLOCKS * nbytes
            extent = _Extent(start, owner, nbytes, 0)
            free.extend(start + index * nbytes for index in reversed(range(EXTENT_BLOCKS)))
            self._extents.update(dict.fromkeys(free, extent))
        offset = free.pop()
        self._extents[offset].used += 1
        return offset

    def give(self, offset: int) -> None:
        """Take space back; an extent of which nothing is used may be any owner's."""
        extent = self._extents[offset]
        extent.used -= 1
        # There is none where another extent of the owner was the last with free space, and went.
        free = self._free.setdefault((extent.owner, extent.nbytes), [])
        free.append(offset)
        if extent.used:
            return
        blocks = {extent.start + index * extent.nbytes for index in range(EXTENT_BLOCKS)}
        left = [one for one in free if one not in blocks]
        if left:
            self._free[extent.owner, extent.nbytes] = left
        else:
            del self._free[extent.owner, extent.nbytes]
        for one in blocks:
            del self._extents[one]
        self._empty.setdefault(extent.nbytes, []).append(extent.start)

    def write(self, offset: int, data: memoryview) -> None:
        """Write a block's bytes, whole pages of page-aligned memory.

        Raises:
            StorageError: the disk is full, or failed every attempt.
            ClosedError: after `close()`.
        """
        done = attempts = 0
        while done < len(data):
            with self._lock:
                descriptor = self._descriptor
            if descriptor < 0:
                raise ClosedError("the model's runtime was closed; load the model again")
            try:
                # A short write may end inside a page, where O_DIRECT cannot go on: that page is written again.
                count = self._pwrite(descriptor, data[done:], offset + done) // 4096 * 4096
                if count == 0:
                    raise OSError(errno.EIO, "the file system wrote less than one page")
            except OSError as error:
                attempts += 1
                with self._lock:
                    self.write_retries += 1
                if error.errno not in RETRIED or attempts >= WRITE_ATTEMPTS:
                    raise self._error(error, f"writing {len(data)} bytes of KV cache") from error
                time.sleep(RETRY_PAUSE_S * attempts)
                continue
            done += count
        with self._lock:
            self.bytes_written += len(data)

    def close(self) -> None:
        """Close the descriptors, and with them the file's space is free. May be called again."""
        with self._lock:
            descriptors = {self._descriptor, self._file} - {-1}
            self._descriptor = self._file = -1
        for descriptor in descriptors:
            os.close(descriptor)

    def _open(self, _index: int, direct: bool) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        return os.open(f"/proc/self/fd/{self._file}", flags)

    def _direct_descriptor(self) -> int:
        """For writing; buffered where O_DIRECT is refused, of which the reader warns."""
        try:
            return os.open(f"/proc/self/fd/{self._file}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            return self._file

    def _error(self, error: OSError, action: str) -> StorageError:
        fix = FIXES.get(error.errno or 0, "check the disk, or load with nvme= on another")
        message = f"{action} in {self.directory} failed: {error.strerror or error}; {fix}"
        return StorageError(error.errno or errno.EIO, message)


def _unnamed(directory: Path) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    descriptor, name = tempfile.mkstemp(prefix=".kv-", dir=directory)
    Path(name).unlink()
    return descriptor
