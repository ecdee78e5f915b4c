"""One writer of a store at a time, across processes and threads."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from offload.errors import StoreBusyError
from offload.store import files
from offload.store.names import lock_file

_POLL_SECONDS = 0.05


@contextmanager
def store_lock(
    root: Path,
    key: str,
    *,
    timeout_seconds: float | None,
    on_wait: Callable[[int | None], None] | None = None,
) -> Iterator[None]:
    """Hold the lock of a key. The system lets go of it when the process dies, however it dies.

    Args:
        root: the directory of all stores.
        key: from `names.store_key`.
        timeout_seconds: how long to wait for another holder; None is for ever, 0 not at all.
        on_wait: called once, with the holder's pid where known, before the first wait.

    Raises:
        StoreBusyError: it is still held after the wait; the message names the holder's pid.
        StorageError: the lock file cannot be created.
    """
    path = root / lock_file(key)
    with files.storage_errors("locking", path):
        fd = _acquire(path, timeout_seconds, on_wait)
    try:
        yield
    finally:
        # Unlinked while held: a process that still waits on this file sees, once it has it, that it has no name.
        with suppress(OSError):
            files.unlink(path)
        # Closing would not do where a forked child still has the descriptor.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def lock_holder(root: Path, key: str) -> int | None:
    """Pid of the process that holds a lock now, 0 where it is held by one unknown; None where it is free."""
    try:
        fd = files.open_file(root / lock_file(key), os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _written_pid(fd) or 0
    except OSError:
        return None
    finally:
        os.close(fd)
    return None


def _acquire(path: Path, timeout_seconds: float | None, on_wait: Callable[[int | None], None] | None) -> int:
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    while True:
        fd = files.open_file(path, os.O_RDWR | os.O_CREAT)
        held = False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _has_name(fd, path):
                # The pid is for messages: a full disk, from which a store is to be removed, has no room for it.
                with suppress(OSError):
                    os.ftruncate(fd, 0)
                    files.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                held = True
                return fd
        except BlockingIOError:
            holder = _written_pid(fd)
            if deadline is not None and time.monotonic() >= deadline:
                who = f"process {holder}" if holder else "another process"
                raise StoreBusyError(
                    f"{path.parent}: {who} is writing or removing this store; wait for it to end, or stop it"
                ) from None
            if on_wait is not None:
                on_wait(holder)
                on_wait = None
            time.sleep(_POLL_SECONDS)
        finally:
            if not held:
                os.close(fd)


def _has_name(fd: int, path: Path) -> bool:
    """Whether the locked file is still the one at `path`: its last holder may have unlinked it."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _written_pid(fd: int) -> int | None:
    try:
        return int(os.pread(fd, 32, 0))
    except ValueError:
        return None  # its holder has not written it yet
