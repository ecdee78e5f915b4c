"""A finished store, opened for reading."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple

from offload.errors import StorageError, StoreCorruptError
from offload.store import files
from offload.store.manifest import Manifest, ManifestError, ShardFile, decode_manifest
from offload.store.names import MANIFEST_FILE
from offload.store.source import ExpertGroup

MANIFEST_LIMIT_NBYTES = 256 * 1024**2


class Location(NamedTuple):
    """Where a bundle's bytes are: index of the shard, offset from the start of its file, length; all in bytes."""

    shard: int
    offset: int
    nbytes: int


class ExpertStore:
    """The bundles of one model in one element format, in the shards of one directory.

    Every location lies inside its shard and is aligned to 4 KiB; the bytes there are not read before they are asked
    for. Holds no descriptor, and is never written again: any number of threads and processes may share it.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ExpertStore:
        """Open a store's directory; reads the manifest and the shards' sizes.

        Raises:
            StoreCorruptError: the manifest or a shard is missing, changed, not a file or not of its size.
            StorageError: the system cannot read them.
        """
        directory = Path(path)
        try:
            manifest = decode_manifest(_read_manifest(directory))
        except ManifestError as error:
            raise _corrupt(directory, f"{MANIFEST_FILE}: {error}") from error
        store = cls(directory, manifest)
        for shard in manifest.shards:
            store._check_shard(shard, None)
        return store

    @property
    def identity(self) -> str:
        """The identity of the source, in full."""
        return self.manifest.identity

    @property
    def name(self) -> str:
        """What the user called the model when the store was written."""
        return self.manifest.name

    @property
    def format(self) -> str:
        """Name of the element format."""
        return self.manifest.format

    @property
    def groups(self) -> tuple[ExpertGroup, ...]:
        """The MoE layers in order."""
        return self.manifest.groups

    @property
    def nbytes(self) -> int:
        """Bytes of all shards with their headers."""
        return sum(shard.nbytes for shard in self.manifest.shards)

    @property
    def shard_paths(self) -> tuple[Path, ...]:
        """The shard files, in the order of their indices."""
        return tuple(self.path / shard.file for shard in self.manifest.shards)

    def location(self, group_index: int, expert: int) -> Location:
        """Where an expert's bundle is.

        Raises:
            IndexError: no such group or expert.
        """
        self._check_index(group_index, expert)
        record = self.manifest.bundles[group_index][expert]
        return Location(record.shard, record.offset, self.groups[group_index].layout.nbytes)

    def checksum(self, group_index: int, expert: int) -> int:
        """xxh3_64 of an expert's bundle, padding included.

        Raises:
            IndexError: no such group or expert.
        """
        self._check_index(group_index, expert)
        return self.manifest.bundles[group_index][expert].checksum

    def open_shard(self, index: int, *, direct: bool) -> int:
        """A new descriptor that reads a shard; the caller closes it.

        Args:
            index: index into `shard_paths`.
            direct: with O_DIRECT; reads then need buffers, offsets and lengths that are multiples of 4 KiB.

        Raises:
            StoreCorruptError: the shard is missing, not a file, or not of its size any more.
            StorageError: it cannot be opened; `errno` is EINVAL where the file system has no O_DIRECT.
        """
        shard = self.manifest.shards[index]
        path = self.path / shard.file
        # Without O_NONBLOCK, opening a FIFO put in the shard's place would wait for a writer.
        flags = os.O_RDONLY | os.O_NONBLOCK | (os.O_DIRECT if direct else 0)
        try:
            with files.storage_errors("opening", path):
                fd = files.open_file(path, flags)
        except StorageError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
                raise _corrupt(self.path, f"{shard.file}: {error.strerror}") from error
            raise
        try:
            self._check_shard(shard, fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _check_index(self, group_index: int, expert: int) -> None:
        # A negative index would name another expert in silence.
        if not 0 <= group_index < len(self.groups) or not 0 <= expert < self.groups[group_index].count:
            raise IndexError(f"{self.path}: no expert {expert} in group {group_index}")

    def _check_shard(self, shard: ShardFile, fd: int | None) -> None:
        path = self.path / shard.file
        try:
            status = path.stat() if fd is None else os.fstat(fd)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                raise _corrupt(self.path, f"{shard.file}: {error.strerror}") from error
            with files.storage_errors("reading", path):
                raise
        if not stat.S_ISREG(status.st_mode):
            raise _corrupt(self.path, f"{shard.file}: not a regular file")
        if status.st_size != shard.nbytes:
            raise _corrupt(self.path, f"{shard.file}: {status.st_size} bytes, expected {shard.nbytes}")


def _corrupt(directory: Path, what: str) -> StoreCorruptError:
    removal = f"offload store rm {directory.name} --nvme {directory.parent}"
    fix = f"remove it with `{removal}`; it is rebuilt at the next load"
    return StoreCorruptError(f"expert store {directory}: {what}; {fix}")


def _read_manifest(directory: Path) -> bytes:
    path = directory / MANIFEST_FILE
    try:
        with files.storage_errors("reading", path):
            fd = files.open_file(path, os.O_RDONLY | os.O_NONBLOCK)
            with open(fd, "rb") as file:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise ManifestError("it is not a regular file")
                raw = file.read(MANIFEST_LIMIT_NBYTES + 1)
    except StorageError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR):
            raise ManifestError(str(error.strerror)) from error
        raise
    if len(raw) > MANIFEST_LIMIT_NBYTES:
        raise ManifestError(f"it is longer than {MANIFEST_LIMIT_NBYTES} bytes")
    return raw
