"""Reads from the store's shards: whole ranges, retried, O_DIRECT where the file system has it."""

from __future__ import annotations

import errno
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from offload.errors import ClosedError, SlowReadWarning, StorageError, StoreCorruptError

READ_ATTEMPTS = 4
RETRY_PAUSE_S = 0.002
RETRIED = {errno.EIO, errno.EINTR, errno.EAGAIN, errno.ENOMEM}

Preadv = Callable[[int, Sequence[memoryview], int], int]
OpenShard = Callable[[int, bool], int]


class ShardReader:
    """Open shards of a store, read by any number of threads at once.

    O_DIRECT needs buffers, offsets and sizes in whole 4 KiB pages, which bundles and slots are. Where a file system
    refuses it, reads are buffered, a warning says so, `direct` is False, and what was read is dropped from the page
    cache so that the budget stays true.

    Attributes:
        paths: the shards.
        direct: True until a file system refuses O_DIRECT, at opening or at the first read.
        retries: reads that failed or fell short and were repeated.
    """

    def __init__(self, paths: Sequence[Path], open_shard: OpenShard, *, preadv: Preadv = os.preadv) -> None:
        """Open every shard.

        Args:
            paths: the shards, for messages.
            open_shard: (index, direct) → descriptor; raises an OSError with EINVAL where O_DIRECT is refused.
            preadv: the system call.
        """
        self.paths = tuple(paths)
        self._open_shard = open_shard
        self.direct = True
        self._bytes_read = 0
        self._elsewhere: list[npt.NDArray[np.int64]] = []
        self.retries = 0
        self._preadv = preadv
        self._lock = threading.Lock()
        self._direct: dict[int, int] = {}
        self._buffered: dict[int, int] = {}
        self._closed = False
        try:
            for index in range(len(self.paths)):
                self._open(index)
        except BaseException:
            self.close()
            raise

    def _open(self, index: int) -> None:
        if self.direct:
            try:
                self._direct[index] = self._open_shard(index, True)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                return
            self._refused(index)
        self._buffered[index] = self._open_shard(index, False)

    def _refused(self, shard: int) -> None:
        with self._lock:
            first, self.direct = self.direct, False
        if first:
            warnings.warn(
                f"the file system of {self.paths[shard]} refuses O_DIRECT: expert reads go through the page cache, "
                "which is slower and takes memory beside the budget; put nvme= on a local ext4, xfs or btrfs disk",
                SlowReadWarning,
                stacklevel=2,
            )

    def read(self, shard: int, offset: int, out: memoryview) -> None:
        """Fill `out` from the shard's bytes at `offset`.

        EIO and short reads are repeated a few times, each from where the bytes stopped.

        Args:
            shard: index into `paths`.
            offset: bytes from the file's start; a multiple of 4 KiB for O_DIRECT.
            out: writable; page-aligned for O_DIRECT.

        Raises:
            StorageError: the disk failed every attempt.
            StoreCorruptError: the file ends before the range does.
            ClosedError: after `close()`.
        """
        done = 0
        attempts = 0
        fd = self._direct.get(shard) if self.direct else None
        buffered = fd is None
        if fd is None:
            fd = self._buffered_fd(shard)
        while done < len(out):
            try:
                count = self._preadv(fd, [out[done:]], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and not buffered:
                    fd, buffered = self._buffered_fd(shard), True
                    self._refused(shard)
                    continue
                attempts += 1
                self._count_retry()
                if error.errno not in RETRIED or attempts >= READ_ATTEMPTS:
                    raise StorageError(
                        error.errno,
                        f"reading {len(out)} bytes at {offset} failed after {attempts} attempts: {error.strerror}; "
                        "check the disk, then `offload store verify`",
                        str(self.paths[shard]),
                    ) from error
                time.sleep(RETRY_PAUSE_S * attempts)
                continue
            if count == 0:
                attempts += 1
                self._count_retry()
                if attempts >= READ_ATTEMPTS:
                    raise StoreCorruptError(
                        f"{self.paths[shard]} ends at byte {offset + done}, expected at least {offset + len(out)}: "
                        "the shard was truncated; remove the store with `offload store rm` and load again"
                    )
                continue
            done += count
            if done < len(out):
                self._count_retry()
                if done % 4096 and not buffered:
                    # The rest is not aligned any more.
                    fd, buffered = self._buffered_fd(shard), True
        if buffered:
            os.posix_fadvise(fd, offset, len(out), os.POSIX_FADV_DONTNEED)
        with self._lock:
            self._bytes_read += len(out)

    @property
    def bytes_read(self) -> int:
        """Bytes that arrived since the start, or since it was set to 0."""
        return self._bytes_read + sum(int(count[0]) for count in self._elsewhere)

    @bytes_read.setter
    def bytes_read(self, value: int) -> None:
        self._bytes_read = value - sum(int(count[0]) for count in self._elsewhere)

    def also_reads(self, count: npt.NDArray[np.int64]) -> None:
        """Somebody else reads these shards: `count`, int64 [1], says how many bytes arrived there."""
        self._elsewhere.append(count)

    def direct_fd(self, shard: int) -> int:
        """The descriptor with O_DIRECT; -1 where the file system refused that."""
        return self._direct.get(shard, -1) if self.direct else -1

    def _buffered_fd(self, shard: int) -> int:
        """A descriptor without O_DIRECT."""
        with self._lock:
            if self._closed:
                raise ClosedError("the model's runtime was closed; load the model again")
            if shard not in self._buffered:
                self._buffered[shard] = self._open_shard(shard, False)
            return self._buffered[shard]

    def _count_retry(self) -> None:
        with self._lock:
            self.retries += 1

    def close(self) -> None:
        """Close all descriptors; may be called again."""
        with self._lock:
            self._closed = True
            for fds in (self._direct, self._buffered):
                while fds:
                    os.close(fds.popitem()[1])

    def renew_lock(self) -> None:
        """In a forked child, where another thread may have held the lock when the process was copied."""
        self._lock = threading.Lock()
