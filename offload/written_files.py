"""Files that the user named: reports, traces, timelines. Whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from offload.store.files import storage_errors


def check_place(file: Path | None) -> None:
    """Refuse, before any work, a file whose directory is not there or lets nobody write; None is no file.

    Raises:
        StorageError: naming the file and what its directory lacks.
    """
    if file is None:
        return
    with storage_errors("writing", file):
        directory = file.resolve().parent
        if not directory.is_dir():
            raise OSError(errno.ENOENT, f"there is no directory {directory}")
        if not os.access(file if file.exists() else directory, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def write_whole(file: Path, data: bytes) -> None:
    """Write a file in the place of the one before: a reader, and whoever finds the disk full, has one or the other.

    What is no regular file, such as a pipe or a terminal, is written to as it is. A link stays one.

    Raises:
        StorageError: the file cannot be written; what was there before is as it was.
    """
    with storage_errors("writing", file):
        if file.exists() and not file.is_file():
            file.write_bytes(data)
            return
        place = file.resolve()
        unfinished = place.with_name(f".unfinished-{os.getpid()}-{place.name}")
        try:
            unfinished.write_bytes(data)
            unfinished.replace(place)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
