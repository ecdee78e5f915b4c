"""From a model's experts to a store, or to nothing: there is no state in between that could be taken for one.

lock → temporary directory → shards → manifest → rename into place, each made durable before the next.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from offload.errors import DoesNotFitError, OffloadError, StoreCorruptError
from offload.sizes import format_size
from offload.store import files, names
from offload.store.catalog import find, remove_leftovers, remove_partial, root_directory
from offload.store.locks import store_lock
from offload.store.manifest import BundleRecord, Manifest, ShardFile, encode_manifest, shard_metadata
from offload.store.progress import NoProgress, Progress
from offload.store.shards import SHARD_NBYTES, Shard, check_groups, plan_shards
from offload.store.source import BundleSource
from offload.store.store import ExpertStore
from offload.store.writer import fitting_chunk_nbytes, write_shards

# Manifest and the file system's own records, for each bundle and for the store.
_RECORD_NBYTES = 128
_SLACK_NBYTES = 1024**2


def convert(
    source: BundleSource,
    root: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    timeout_seconds: float | None = None,
    shard_nbytes: int = SHARD_NBYTES,
    memory_nbytes: int | None = None,
) -> ExpertStore:
    """The store of a source: the one that is there, or a new one; of a dense model an empty one that is not written.

    Experts pass through at most `conversion_nbytes(source.groups)` bytes of memory. Of several processes that ask for
    the same store, one writes it and the others wait. A process killed at any point leaves no store; what it left is
    removed by the next conversion under this root.

    Args:
        source: the model's experts; used from the calling thread only.
        root: directory of all stores; created where missing.
        progress: told the bytes of bundles written.
        timeout_seconds: how long to wait for another process that is writing the store; None is for ever.
        shard_nbytes: the most bytes of bundles in one shard; a larger bundle has a shard of its own.
        memory_nbytes: what the conversion may take of host memory, as far as its largest bundle allows.

    Raises:
        DoesNotFitError: too little free disk; `minimum_disk_bytes` says how much there must be.
        StoreBusyError: another process still holds the store after `timeout_seconds`.
        StoreCorruptError: the store is there, and damaged.
        StorageError: the directory cannot be written, or the disk is full or fails.
        InvalidArgumentError: the root is not a directory, or the source's groups or identity cannot be stored.
        CheckpointChangedError: the source changed while it was read; nothing is left of the store.
    """
    groups = tuple(source.groups)
    if not groups:
        return _nothing(source, root_directory(root, create=False))
    check_groups(groups)
    element_format = groups[0].layout.format
    key = names.store_key(source.identity, element_format)
    directory = root_directory(root, create=True)
    shown = progress or NoProgress()
    waiting = False

    def on_wait(holder: int | None) -> None:
        nonlocal waiting
        waiting = True
        shown.start(0, f"waiting for process {holder or 'unknown'}, which converts {source.name}")

    found = _found(source, directory, element_format)
    if found is not None:
        return found
    remove_leftovers(directory)
    try:
        with store_lock(directory, key, timeout_seconds=timeout_seconds, on_wait=on_wait):
            if waiting:
                waiting = False
                shown.finish()
            found = _found(source, directory, element_format)
            return found or _convert_locked(source, directory, key, shown, shard_nbytes, memory_nbytes)
    finally:
        if waiting:
            shown.finish()


def find_store(source: BundleSource, root: str | os.PathLike[str]) -> ExpertStore | None:
    """The store of a source that `convert` would return at once; None if it would have to be written.

    Raises:
        StoreCorruptError: the store is there, and damaged.
        StorageError, InvalidArgumentError: see `convert`.
    """
    directory = root_directory(root, create=False)
    if not source.groups:
        return _nothing(source, directory)
    check_groups(tuple(source.groups))
    return _found(source, directory, source.groups[0].layout.format)


def _nothing(source: BundleSource, root: Path) -> ExpertStore:
    """The store of a dense model: an empty one, of which nothing lies on disk."""
    return ExpertStore(root, Manifest(source.identity, source.name, "", int(time.time()), (), (), ()))


def _found(source: BundleSource, root: Path, element_format: str) -> ExpertStore | None:
    store = find(root, source.identity, element_format)
    if store is not None and store.groups != tuple(source.groups):
        raise StoreCorruptError(
            f"expert store {store.path}: it holds other layers than {source.name} has; "
            f"remove it with `offload store rm {store.path.name} --nvme {root}`; it is rebuilt at the next load"
        )
    return store


def _convert_locked(
    source: BundleSource, root: Path, key: str, progress: Progress, shard_nbytes: int, memory_nbytes: int | None
) -> ExpertStore:
    groups = tuple(source.groups)
    element_format = groups[0].layout.format
    # A path that is not UTF-8 has lone surrogates, which JSON readers refuse.
    name = source.name.encode("utf-8", "replace").decode("utf-8")
    shards = plan_shards(groups, shard_metadata(source.identity, name, element_format), shard_nbytes)
    partial = root / names.partial_directory(key)
    final = root / names.store_directory(name, key)
    remove_partial(partial)
    _check_space(shards, root)
    try:
        with files.storage_errors("creating", partial):
            files.mkdir(partial)
            marker = json.dumps({"name": name, "format": element_format, "identity": source.identity})
            files.write_file(partial / names.MARKER_FILE, marker.encode("ascii"))
        progress.start(sum(group.count * group.layout.nbytes for group in groups), f"converting {name}")
        try:
            checksums = write_shards(source, shards, partial, progress, fitting_chunk_nbytes(groups, memory_nbytes))
        finally:
            progress.finish()
        source.check_unchanged()
        manifest = Manifest(
            identity=source.identity,
            name=name,
            format=element_format,
            created_unix=int(time.time()),
            shards=tuple(
                ShardFile(names.shard_file(index, len(shards)), shard.nbytes) for index, shard in enumerate(shards)
            ),
            groups=groups,
            bundles=_records(shards, checksums, len(groups)),
        )
        with files.storage_errors("writing", partial):
            files.write_file(partial / names.MANIFEST_TEMPORARY_FILE, encode_manifest(manifest))
            files.rename(partial / names.MANIFEST_TEMPORARY_FILE, partial / names.MANIFEST_FILE)
            files.unlink(partial / names.MARKER_FILE)
            files.fsync_directory(partial)
        with files.storage_errors("writing", final):
            files.rename(partial, final)
            files.fsync_directory(root)
    except BaseException:
        # What failed is worth reporting, not that cleaning up after it failed too.
        with suppress(OffloadError):
            remove_partial(partial)
        raise
    return ExpertStore.open(final)


def _records(shards: tuple[Shard, ...], checksums: list[int], group_count: int) -> tuple[tuple[BundleRecord, ...], ...]:
    """The bundles' records by group; `checksums` are in the order of the shards' bundles."""
    records: list[list[BundleRecord]] = [[] for _ in range(group_count)]
    placed = [(index, shard, bundle) for index, shard in enumerate(shards) for bundle in shard.bundles]
    for (index, shard, bundle), checksum in zip(placed, checksums, strict=True):
        records[bundle.group].append(BundleRecord(index, len(shard.header) + bundle.offset, checksum))
    return tuple(tuple(group) for group in records)


def _check_space(shards: tuple[Shard, ...], root: Path) -> None:
    bundles = sum(len(shard.bundles) for shard in shards)
    needed = sum(shard.nbytes for shard in shards) + bundles * _RECORD_NBYTES + _SLACK_NBYTES
    with files.storage_errors("reading", root):
        free = files.free_nbytes(root)
    if free < needed:
        raise DoesNotFitError(
            f"{root}: the expert store needs {format_size(needed)} of disk and {format_size(free)} are free; "
            "free space there (`offload store ls` shows what stores take), or use a directory on another disk",
            minimum_disk_bytes=needed,
        )
