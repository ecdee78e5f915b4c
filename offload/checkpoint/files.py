"""Reading files that nobody vouches for: nothing here blocks, maps memory or returns fewer bytes than asked."""

from __future__ import annotations

import errno
import os
import stat
import time
from dataclasses import dataclass

from offload.checkpoint.mismatch import mismatch
from offload.errors import CheckpointChangedError, CheckpointError, CheckpointNotFoundError, StorageError

READ_ATTEMPTS = 4
FIRST_RETRY_SECONDS = 0.01
# Bounds what the page cache holds of a large read before the pages are given back.
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class FileIdentity:
    """What `stat` says of a file; any replacement or rewrite changes it."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """The identity in a stat result."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def open_regular(path: str | os.PathLike[str]) -> tuple[int, FileIdentity]:
    """Open a regular file for reading; the caller closes the descriptor.

    Symbolic links are followed wherever they lead: a Hub snapshot is made of them.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: not a regular file, a loop of links, or not readable.
    """
    try:
        # A FIFO without a writer would block an open without O_NONBLOCK; regular files ignore the flag.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _open_error(path, error) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise mismatch(path, expected="a regular file", found=_kind(status.st_mode))
    return descriptor, FileIdentity.of(status)


def read_exactly(
    descriptor: int, buffer: memoryview, offset: int, path: str | os.PathLike[str], *, drop_cache: bool = False
) -> None:
    """Fill `buffer` with the bytes at `offset`.

    Args:
        descriptor: an open file.
        buffer: writable, contiguous, one byte per item.
        offset: bytes from the file's start.
        path: named in errors.
        drop_cache: give the pages that were read back to the system, for data that is read once.

    Raises:
        CheckpointChangedError: the file ends before the range does.
        StorageError: the device reports an error and keeps reporting it.
    """
    done = 0
    while done < len(buffer):
        chunk = buffer[done : done + CHUNK_BYTES]
        count = read_some(descriptor, chunk, offset + done, path)
        if count == 0:
            raise CheckpointChangedError(
                f"{os.fspath(path)}: expected {len(buffer)} bytes at offset {offset}, found the end of the file after "
                f"{done}. Fix: the file became shorter while it was in use; restore it and load the model again."
            )
        if drop_cache:
            os.posix_fadvise(descriptor, offset + done, count, os.POSIX_FADV_DONTNEED)
        done += count


def read_small(path: str | os.PathLike[str], limit_bytes: int) -> bytes:
    """All bytes of a regular file of at most `limit_bytes`, such as an index or a config."""
    descriptor, identity = open_regular(path)
    try:
        if identity.size > limit_bytes:
            raise mismatch(path, expected=f"at most {limit_bytes} bytes", found=f"{identity.size} bytes")
        content = bytearray(identity.size)
        read_exactly(descriptor, memoryview(content), 0, path)
        return bytes(content)
    finally:
        os.close(descriptor)


def read_some(descriptor: int, buffer: memoryview, offset: int, path: str | os.PathLike[str]) -> int:
    """Bytes that arrived at the front of `buffer`, 0 at the file's end; errors that may pass are retried.

    Raises:
        StorageError: the device reports an error and keeps reporting it.
    """
    for attempt in range(READ_ATTEMPTS):
        try:
            return os.preadv(descriptor, [buffer], offset)
        except OSError as error:
            last = attempt == READ_ATTEMPTS - 1
            if last or error.errno not in (errno.EIO, errno.EINTR, errno.EAGAIN):
                raise StorageError(
                    error.errno,
                    f"reading {len(buffer)} bytes at offset {offset} failed {attempt + 1} times: {error.strerror}. "
                    "Fix: check the disk or the network file system, then load again",
                    os.fspath(path),
                ) from error
            time.sleep(FIRST_RETRY_SECONDS * 2**attempt)
    raise AssertionError("the loop returns or raises")


def _open_error(path: str | os.PathLike[str], error: OSError) -> CheckpointError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return CheckpointNotFoundError(
            f"{os.fspath(path)}: expected a file, found none. Fix: finish the download, or pass the directory that "
            "holds the whole checkpoint."
        )
    if error.errno == errno.ELOOP:
        return mismatch(path, expected="a regular file", found="a loop of symbolic links")
    fix = "make the file readable to this user" if error.errno == errno.EACCES else "check the file system"
    return mismatch(path, expected="a readable file", found=f"{error.strerror}", fix=fix)


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")
