"""The stores under one root directory: finding, listing and removing them."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offload.errors import InvalidArgumentError, OffloadError, StorageError, StoreBusyError, StoreError
from offload.store import files, names
from offload.store.locks import lock_holder, store_lock
from offload.store.store import ExpertStore

Status = Literal["complete", "incomplete", "corrupt", "unreadable"]


@dataclass(frozen=True)
class StoreInfo:
    """A store as it is found.

    Attributes:
        key: the directory's name; what `remove_store` takes.
        path: the directory.
        name: what the user called the model; empty where it cannot be read.
        format: name of the element format; empty where it cannot be read.
        nbytes: bytes of the files in it.
        created_unix: when it was written or, where it is not complete, last changed; seconds since 1970.
        status: incomplete while it is written and after a conversion or removal died; unreadable where the system
            refuses, as for another user's directory.
        detail: why it is not complete; empty where it is.
    """

    key: str
    path: Path
    name: str
    format: str
    nbytes: int
    created_unix: float
    status: Status
    detail: str


def root_directory(root: str | os.PathLike[str], *, create: bool) -> Path:
    """The root as a path, `~` expanded.

    Raises:
        InvalidArgumentError: it is not a directory.
        StorageError: it cannot be created.
    """
    try:
        path = Path(root).expanduser()
        with files.storage_errors("opening", path):
            if create:
                path.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.is_dir():
                return path
    except (ValueError, RuntimeError) as error:  # a null byte; a home that is not known
        raise InvalidArgumentError(f"{os.fspath(root)!r}: {error}") from error
    except StorageError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTDIR):
            raise
    raise InvalidArgumentError(f"{str(path)!r} is or leads through a file; stores need a directory")


def find(root: str | os.PathLike[str], identity: str, element_format: str) -> ExpertStore | None:
    """The store of a model in an element format; None where there is none.

    Args:
        root: the directory of all stores; may be missing.
        identity: the source's identity, in full.
        element_format: name of the element format.

    Raises:
        StoreCorruptError: there is one, and it is damaged.
        StorageError: it cannot be read.
        InvalidArgumentError: the root is not a directory, or the identity not a digest.
    """
    key = names.store_key(identity, element_format)
    for path in _directories(root_directory(root, create=False)):
        if names.key_of_store(path.name) == key:
            store = ExpertStore.open(path)
            if (store.identity, store.format) == (identity, element_format):
                return store
    return None


def list_stores(root: str | os.PathLike[str]) -> list[StoreInfo]:
    """All stores under a root, complete or not, in the order of their keys; none where the root is missing.

    Raises:
        InvalidArgumentError: the root is not a directory.
        StorageError: the root cannot be read.
    """
    found = []
    directory = root_directory(root, create=False)
    for path in _directories(directory):
        if names.key_of_store(path.name) is not None:
            found.append(_store_info(path))
        elif (key := names.key_of_partial(path.name)) is not None:
            found.append(_partial_info(path, lock_holder(directory, key)))
    return found


def remove_store(root: str | os.PathLike[str], key: str) -> None:
    """Remove a store, whole or not, from disk. A process that has its shards open can go on reading them.

    Args:
        root: the directory of all stores.
        key: as `list_stores` gives it.

    Raises:
        InvalidArgumentError: there is none of that key; the message lists those there are.
        StoreBusyError: a conversion or a removal holds it.
        StoreError: it holds files that no store has; nothing is removed.
        StorageError: the system refuses.
    """
    directory = root_directory(root, create=False)
    known = {
        path.name: names.key_of_store(path.name) or names.key_of_partial(path.name) for path in _directories(directory)
    }
    lock_key = known.get(key)
    if lock_key is None:
        choices = ", ".join(name for name, value in known.items() if value) or "none"
        raise InvalidArgumentError(f"no store {key!r} in {directory}; there are: {choices}")
    with store_lock(directory, lock_key, timeout_seconds=0):
        partial = directory / names.partial_directory(lock_key)
        path = directory / key
        if path != partial:
            _check_own(path)
            remove_partial(partial)
            # Out of sight first: a removal that dies half-way leaves no store that looks whole.
            with files.storage_errors("removing", path):
                files.rename(path, partial)
            learnt = directory / names.learnt_file(lock_key)
            with files.storage_errors("removing", learnt), suppress(FileNotFoundError):
                files.unlink(learnt)
        remove_partial(partial)


def remove_leftovers(root: Path) -> None:
    """Remove what dead conversions and removals left, of every store whose lock is free."""
    for path in _directories(root):
        key = names.key_of_partial(path.name)
        if key is not None:
            try:
                with store_lock(root, key, timeout_seconds=0):
                    remove_partial(path)
            except (StoreBusyError, StoreError, StorageError):
                # Busy, or with a stranger's file in it; `list_stores` shows it, and this conversion does not need it.
                continue


def remove_partial(path: Path) -> None:
    """Remove a partial directory, if there; the caller holds its lock.

    Raises:
        StoreError: it holds files that no store has; nothing is removed.
        StorageError: the system refuses.
    """
    if not os.path.lexists(path):
        return
    _check_own(path)
    with files.storage_errors("removing", path):
        for entry in sorted(path.iterdir()):
            files.unlink(entry)
        files.rmdir(path)


def _directories(root: Path) -> Iterator[Path]:
    if not root.exists():
        return
    with files.storage_errors("listing", root):
        entries = sorted(root.iterdir())
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            yield path


def _check_own(path: Path) -> None:
    with files.storage_errors("listing", path):
        foreign = [entry.name for entry in sorted(path.iterdir()) if not names.is_own_file(entry.name)]
    if foreign:
        raise StoreError(f"{path} also holds {', '.join(foreign[:3])}, which no store has; move it away, then remove")


def _store_info(path: Path) -> StoreInfo:
    try:
        store = ExpertStore.open(path)
    except OffloadError as error:
        status: Status = "unreadable" if isinstance(error, StorageError) else "corrupt"
        return StoreInfo(path.name, path, "", "", _nbytes(path), _changed_unix(path), status, str(error))
    created = store.manifest.created_unix
    return StoreInfo(path.name, path, store.name, store.format, store.nbytes, created, "complete", "")


def _partial_info(path: Path, holder: int | None) -> StoreInfo:
    name = element_format = ""
    try:
        marker = json.loads((path / names.MARKER_FILE).read_bytes()[:65536])
        name, element_format = str(marker["name"]), str(marker["format"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # it died before the marker was whole
    detail = "its conversion or removal did not end; the next conversion removes it"
    if holder is not None:
        detail = f"process {holder} is at work on it" if holder else "another process is at work on it"
    return StoreInfo(path.name, path, name, element_format, _nbytes(path), _changed_unix(path), "incomplete", detail)


def _nbytes(path: Path) -> int:
    total = 0
    try:
        for entry in path.iterdir():
            status = entry.lstat()
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    except OSError:
        pass  # it is being written or removed, or cannot be read: what was counted stands
    return total


def _changed_unix(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
