"""Disks that fail, fall short or lie: typed errors, nothing lost that was not on them, and the next cache works."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from offload.errors import ClosedError, OffloadError, StorageError, StoreCorruptError
from tests.kv.tables import Twin, make_table, small_pool


class Disk:
    """The system's calls, until told otherwise.

    Attributes:
        on_write: (bytes asked, offset) → bytes to write at most; may raise.
        on_read: as `on_write`.
    """

    def __init__(self) -> None:
        self.on_write: Callable[[int, int], int] = lambda nbytes, offset: nbytes
        self.on_read: Callable[[int, int], int] = lambda nbytes, offset: nbytes

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data[: self.on_write(len(data), offset)], offset)

    def preadv(self, fd: int, out: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, [out[0][: self.on_read(len(out[0]), offset)]], offset)


def _fail(number: int) -> Callable[[int, int], int]:
    def call(nbytes: int, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_write_that_fails_loses_nothing(tmp_path: Path, number: int) -> None:
    disk = Disk()
    pool = small_pool(tmp_path, 12, pwrite=disk.pwrite, preadv=disk.preadv)
    disk.on_write = _fail(number)
    twin = Twin(make_table(pool, 1))
    twin.append(8 * 16)
    with pytest.raises(StorageError) as caught:
        for _ in range(10):
            twin.append(16)
    assert caught.value.errno == number and str(tmp_path) in str(caught.value)
    assert twin.table.tokens >= 8 * 16
    twin.keys, twin.values = (part[:, :, : twin.table.tokens] for part in (twin.keys, twin.values))
    twin.table.crop(twin.keys.shape[2])
    twin.check()
    pool.check()
    disk.on_write = lambda nbytes, offset: nbytes
    twin.append(100)
    twin.check()
    assert pool.below.blocks_written > 0
    pool.check()
    pool.close()


def test_a_read_that_fails_is_tried_again_and_then_reported(tmp_path: Path) -> None:
    disk = Disk()
    pool = small_pool(tmp_path, 6, pwrite=disk.pwrite, preadv=disk.preadv)
    twin = Twin(make_table(pool, 1))
    twin.append(300)
    failures = iter([True, False, True, False])

    def sometimes(nbytes: int, offset: int) -> int:
        return _fail(errno.EIO)(nbytes, offset) if next(failures, False) else nbytes

    disk.on_read = sometimes
    twin.check()
    assert pool.staging.reader.retries == 2
    disk.on_read = _fail(errno.EIO)
    with pytest.raises(StorageError, match="Input/output"):
        twin.table.read(0, 0, 300)
    disk.on_read = lambda nbytes, offset: nbytes
    twin.check()
    twin.append(20)
    twin.check()
    pool.check()
    pool.close()


def test_calls_that_fall_short_are_continued(tmp_path: Path) -> None:
    disk, chance = Disk(), random.Random(1)
    pool = small_pool(tmp_path, 12, pwrite=disk.pwrite, preadv=disk.preadv)

    def short(nbytes: int, offset: int) -> int:
        return nbytes if chance.random() < 0.5 else max(4096, nbytes // 2 // 4096 * 4096)

    disk.on_write = disk.on_read = short
    twin = Twin(make_table(pool, 2))
    twin.append(200)
    twin.check()
    pool.check()
    pool.close()


def test_bytes_that_changed_on_disk_are_found(tmp_path: Path) -> None:
    pool = small_pool(tmp_path, 6)
    twin, other = Twin(make_table(pool, 1), 1), Twin(make_table(pool, 1), 2)
    twin.append(200)
    other.append(40)
    cold = [int(block) for block in twin.table.blocks(0, 0, twin.table.columns) if pool.addresses[block] == 0]
    with open(f"/proc/self/fd/{pool.file.descriptor}", "r+b", buffering=0) as file:
        file.seek(int(pool.records.offsets[cold[1]]) + 100)
        file.write(b"\xff\x00\xff\x00")
    with pytest.raises(StoreCorruptError, match=r"KV blocks.*checksum.*nvme="):
        twin.table.read(0, 0, 200)
    other.check()
    pool.check()
    pool.close()


def test_a_closed_pool_says_so(tmp_path: Path) -> None:
    pool = small_pool(tmp_path, 6)
    twin = Twin(make_table(pool, 1))
    twin.append(20)
    pool.close()
    pool.close()
    with pytest.raises(ClosedError):
        twin.append(40)


def test_nothing_is_left_in_the_directory(tmp_path: Path) -> None:
    pool = small_pool(tmp_path, 6)
    twin = Twin(make_table(pool, 1))
    twin.append(300)
    assert list(tmp_path.iterdir()) == []
    pool.close()


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(OffloadError, match="file"):
        small_pool(blocker / "kv", 6)
