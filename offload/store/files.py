"""Every call by which the store touches the disk, in one place, so that each can be made to fail or to be the last.

The first half are the system calls, one each; the second half is built of them and calls them by their module
name. Both raise OSError; `storage_errors` turns it into the package's own error at the place that knows the path.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from formats.bundle import BUNDLE_ALIGNMENT_BYTES
from offload.errors import OffloadError, StorageError

Bytes = npt.NDArray[np.uint8]

FIXES = {
    errno.ENOSPC: "free space there, or use a directory on another disk",
    errno.EDQUOT: "free space in your quota, or use a directory on another disk",
    errno.EROFS: "the file system is read-only; use a directory that can be written",
    errno.EACCES: "use a directory that you may read and write",
    errno.EPERM: "use a directory that you may read and write",
    errno.EIO: "the disk or its connection fails; see the kernel's log, or use a directory on another disk",
}


def open_file(path: Path, flags: int) -> int:
    """os.open; the descriptor is not inherited by programs that this one starts."""
    return os.open(path, flags | os.O_CLOEXEC, 0o644)


def pwrite(fd: int, data: memoryview | bytes, offset: int) -> int:
    """os.pwrite: bytes written, maybe fewer than given."""
    return os.pwrite(fd, data, offset)


def preadv(fd: int, out: memoryview, offset: int) -> int:
    """os.preadv into one buffer: bytes read, 0 at the end."""
    return os.preadv(fd, [out], offset)


def fsync(fd: int) -> None:
    """os.fsync."""
    os.fsync(fd)


def rename(old: Path, new: Path) -> None:
    """os.rename."""
    os.rename(old, new)  # noqa: PTH104


def mkdir(path: Path) -> None:
    """os.mkdir."""
    path.mkdir()


def unlink(path: Path) -> None:
    """os.unlink."""
    path.unlink()


def rmdir(path: Path) -> None:
    """os.rmdir."""
    path.rmdir()


def drop_cache(fd: int, offset: int = 0, nbytes: int = 0) -> None:
    """Let go of clean pages in the page cache; 0 bytes means up to the file's end."""
    os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def free_nbytes(directory: Path) -> int:
    """Bytes that this user may still write to the directory's file system."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


@contextmanager
def storage_errors(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError of the body into a StorageError that names `path` and a fix, and keeps `errno`."""
    try:
        yield
    except OffloadError:
        raise
    except OSError as error:
        fix = FIXES.get(error.errno or 0)
        message = f"{action} {path}: {error.strerror or error}" + (f"; {fix}" if fix else "")
        raise StorageError(error.errno or errno.EIO, message) from error


def aligned_buffer(nbytes: int) -> Bytes:
    """uint8 [nbytes] of zeros that starts at a page: what O_DIRECT asks for."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A transfer of one huge page is one piece for the disk, of small pages one each: half the speed.
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


def write_all(fd: int, data: Bytes, offset: int) -> None:
    """Write all of `data`, whose length and offset are multiples of 4 KiB.

    Raises:
        OSError: of the call; EIO where it writes less than a block.
    """
    done = 0
    while done < data.nbytes:
        # A short write may end inside a block, where O_DIRECT cannot go on: that block is written again.
        written = pwrite(fd, data.data[done:], offset + done) // BUNDLE_ALIGNMENT_BYTES * BUNDLE_ALIGNMENT_BYTES
        if written <= 0:
            raise OSError(errno.EIO, "the file system wrote less than one block")
        done += written


def read_all(fd: int, out: Bytes, offset: int) -> int:
    """Fill `out`; the bytes read are fewer than its length only where the file ends."""
    done = 0
    while done < out.nbytes:
        count = preadv(fd, out.data[done:], offset + done)
        if count == 0:
            break
        done += count
    return done


def fsync_directory(directory: Path) -> None:
    """Make the directory's entries durable."""
    fd = open_file(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, content: bytes) -> None:
    """Create `path` with `content` and make its bytes, but not its name, durable."""
    fd = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        done = 0
        while done < len(content):
            written = pwrite(fd, content[done:], done)
            if written <= 0:
                raise OSError(errno.EIO, "the file system wrote nothing")
            done += written
        fsync(fd)
    finally:
        os.close(fd)
