"""Reading a whole store against its checksums."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from offload.errors import OffloadError, StorageError
from offload.store import files
from offload.store.manifest import shard_metadata
from offload.store.progress import NoProgress, Progress
from offload.store.shards import Bundle, shard_header, tensor_name
from offload.store.store import ExpertStore

READ_NBYTES = 16 * 1024**2


@dataclass(frozen=True)
class StoreProblem:
    """Something that is not as it was written.

    Attributes:
        path: the shard.
        tensor: name of the bundle; empty where the shard as a whole or its header is meant.
        message: what was expected and what was found.
    """

    path: Path
    tensor: str
    message: str


def verify(store: ExpertStore, progress: Progress | None = None) -> list[StoreProblem]:
    """Read every byte of a store from disk and compare it; memory is bounded by one 16 MiB buffer.

    Args:
        store: not changed.
        progress: told the bytes read.

    Returns:
        What is wrong, in the order of the shards; empty where the store is as it was written.
    """
    shown = progress or NoProgress()
    shown.start(store.nbytes, f"verifying {store.name}")
    problems: list[StoreProblem] = []
    try:
        for index in range(len(store.shard_paths)):
            problems += _verify_shard(store, index, shown)
    finally:
        shown.finish()
    return problems


def _verify_shard(store: ExpertStore, index: int, progress: Progress) -> Iterator[StoreProblem]:
    path = store.shard_paths[index]
    bundles = sorted(
        (record.offset, group, expert)
        for group, records in enumerate(store.manifest.bundles)
        for expert, record in enumerate(records)
        if record.shard == index
    )
    start = bundles[0][0] if bundles else 0
    try:
        fd = store.open_shard(index, direct=False)
    except OffloadError as error:
        yield StoreProblem(path, "", str(error))
        progress.advance(store.manifest.shards[index].nbytes)
        return
    try:
        # A page that is still cached would hide what the disk gives.
        files.drop_cache(fd)
        layout = [
            Bundle(group, expert, offset - start, store.groups[group].layout.nbytes)
            for offset, group, expert in bundles
        ]
        metadata = shard_metadata(store.identity, store.name, store.format)
        header = shard_header(store.groups, layout, metadata)
        message = _compare(fd, path, 0, start, xxhash.xxh3_64_intdigest(header))
        if message:
            yield StoreProblem(path, "", f"header: {message}")
        progress.advance(start)
        for offset, group, expert in bundles:
            nbytes = store.groups[group].layout.nbytes
            message = _compare(fd, path, offset, nbytes, store.checksum(group, expert))
            if message:
                yield StoreProblem(path, tensor_name(store.groups[group], expert), message)
            progress.advance(nbytes)
            files.drop_cache(fd, offset, nbytes)
    finally:
        os.close(fd)


def _compare(fd: int, path: Path, offset: int, nbytes: int, expected: int) -> str:
    """What is wrong with a span of a shard; empty where its xxh3_64 is as expected."""
    buffer = np.empty(min(READ_NBYTES, nbytes), dtype=np.uint8)
    digest = xxhash.xxh3_64()
    done = 0
    while done < nbytes:
        part = buffer[: min(buffer.nbytes, nbytes - done)]
        try:
            with files.storage_errors("reading", path):
                count = files.read_all(fd, part, offset + done)
        except StorageError as error:
            return str(error)
        if count < part.nbytes:
            return f"the file ends at byte {offset + done + count}, expected {nbytes} bytes from {offset}"
        digest.update(part.data)
        done += part.nbytes
    if digest.intdigest() != expected:
        return f"checksum {digest.intdigest():016x}, expected {expected:016x}"
    return ""
