"""Reads of bytes that are needed once, past the page cache: from any offset, of any length, into any memory."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from offload.checkpoint.files import read_exactly, read_some
from offload.errors import SlowReadWarning
from offload.store.files import aligned_buffer

PAGE_NBYTES = 4096
SCRATCH_NBYTES = 2 << 20
"""Bytes read at once; as many for each thread that reads at the same time."""


class DirectReader:
    """Reads files with O_DIRECT through page-aligned memory of its own, from several threads at once.

    Where a file system refuses O_DIRECT, reads go through the page cache, a warning says so, and the pages are given
    back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptors: dict[int, int | None] = {}
        self._free: list[npt.NDArray[np.uint8]] = []

    def read(self, descriptor: int, buffer: memoryview, offset: int, path: str) -> None:
        """Fill `buffer` with the bytes of an open file at `offset`.

        Args:
            descriptor: of the file, which stays open as long as the reader.
            buffer: writable, contiguous, one byte per item.
            offset: bytes from the file's start.
            path: named in errors.

        Raises:
            CheckpointChangedError: the file ends before the range does.
            StorageError: the device reports an error and keeps reporting it.
        """
        direct = self._direct(descriptor, path)
        if direct is None:
            read_exactly(descriptor, buffer, offset, path, drop_cache=True)
            return
        out = np.frombuffer(buffer, dtype=np.uint8)
        done = 0
        with self._scratch() as scratch:
            while done < len(out):
                start = (offset + done) // PAGE_NBYTES * PAGE_NBYTES
                skipped = offset + done - start
                asked = min(-(-(skipped + len(out) - done) // PAGE_NBYTES) * PAGE_NBYTES, SCRATCH_NBYTES)
                count = min(read_some(direct, scratch[:asked].data, start, path) - skipped, len(out) - done)
                if count <= 0:
                    # The file's end, or a read that stopped within a page, where O_DIRECT cannot go on.
                    read_exactly(descriptor, buffer[done:], offset + done, path, drop_cache=True)
                    return
                out[done : done + count] = scratch[skipped : skipped + count]
                done += count

    def close(self) -> None:
        """Close the files; no read may be in progress."""
        with self._lock:
            for descriptor in self._descriptors.values():
                if descriptor is not None:
                    os.close(descriptor)
            self._descriptors.clear()
            self._free.clear()

    @contextmanager
    def _scratch(self) -> Iterator[npt.NDArray[np.uint8]]:
        with self._lock:
            scratch = self._free.pop() if self._free else None
        scratch = aligned_buffer(SCRATCH_NBYTES) if scratch is None else scratch
        try:
            yield scratch
        finally:
            with self._lock:
                self._free.append(scratch)

    def _direct(self, descriptor: int, path: str) -> int | None:
        """A second descriptor of the same open file, whatever its path leads to by now; None if O_DIRECT is refused."""
        with self._lock:
            if descriptor in self._descriptors:
                return self._descriptors[descriptor]
            direct: int | None = None
            try:
                direct = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
                # Some file systems refuse only the read.
                os.preadv(direct, [aligned_buffer(PAGE_NBYTES).data], 0)
            except OSError as error:
                if direct is not None:
                    os.close(direct)
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT):
                    # The disk's own troubles are met, retried and reported where the bytes are read.
                    return None
                direct = None
                warnings.warn(
                    f"{path}: the file system refuses O_DIRECT: the checkpoint is read through the page cache, which "
                    "is slower; this concerns loading and not generation",
                    SlowReadWarning,
                    stacklevel=2,
                )
            self._descriptors[descriptor] = direct
            return direct
