"""Reads from shards with system calls that fail, fall short or refuse."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from offload.errors import ClosedError, SlowReadWarning, StorageError, StoreCorruptError
from offload.tiers import disk
from offload.tiers.disk import READ_ATTEMPTS, ShardReader
from tests.tiers.readers import Bytes, random_bytes

PAGE = 4096
SHARD_NBYTES = 16 * PAGE


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.time, "sleep", lambda _seconds: None)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard-0"
    path.write_bytes(random_bytes(SHARD_NBYTES, seed=1).tobytes())
    return path


class Disk:
    """Opens shards without O_DIRECT, whatever is asked, and answers reads from a script.

    Attributes:
        script: for each read in turn: an errno to fail with, a byte count to stop at, or None for a whole read; after
            its end reads are whole.
        direct: descriptors that were opened for O_DIRECT.
        reads: (descriptor was opened for O_DIRECT, offset, nbytes asked for).
    """

    def __init__(self, path: Path, script: Sequence[OSError | int | None] = (), refuses: bool = False) -> None:
        self.path = path
        self.script = list(script)
        self.refuses = refuses
        self.direct: set[int] = set()
        self.opened: list[bool] = []
        self.reads: list[tuple[bool, int, int]] = []

    def open(self, _index: int, direct: bool) -> int:
        if direct and self.refuses:
            raise StorageError(errno.EINVAL, "Invalid argument", str(self.path))
        fd = os.open(self.path, os.O_RDONLY)
        self.opened.append(direct)
        (self.direct.add if direct else self.direct.discard)(fd)
        return fd

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.reads.append((fd in self.direct, offset, len(buffers[0])))
        answer = self.script.pop(0) if self.script else None
        if isinstance(answer, OSError):
            raise answer
        if answer is not None:
            buffers = [buffers[0][:answer]]
        return os.preadv(fd, buffers, offset) if answer != 0 else 0


def fault(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def read(reader: ShardReader, offset: int = PAGE, nbytes: int = 3 * PAGE) -> Bytes:
    out = np.full(nbytes, 0xA5, np.uint8)
    reader.read(0, offset, memoryview(out))  # type: ignore[arg-type]
    return out


def expected(offset: int = PAGE, nbytes: int = 3 * PAGE) -> Bytes:
    return random_bytes(SHARD_NBYTES, seed=1)[offset : offset + nbytes]


@pytest.fixture
def make(shard: Path) -> Iterator[Callable[..., tuple[ShardReader, Disk]]]:
    readers = []

    def make(*script: OSError | int | None) -> tuple[ShardReader, Disk]:
        fake = Disk(shard, script)
        reader = ShardReader([shard], fake.open, preadv=fake.preadv)
        readers.append(reader)
        return reader, fake

    yield make
    for reader in readers:
        reader.close()


Make = Callable[..., tuple[ShardReader, Disk]]


def test_a_range_is_read(make: Make) -> None:
    reader, fake = make()
    assert np.array_equal(read(reader), expected())
    assert fake.reads == [(True, PAGE, 3 * PAGE)]
    assert (reader.direct, reader.bytes_read, reader.retries) == (True, 3 * PAGE, 0)


@pytest.mark.parametrize("number", [errno.EIO, errno.EINTR, errno.EAGAIN, errno.ENOMEM])
@pytest.mark.parametrize("times", range(1, READ_ATTEMPTS))
def test_a_passing_fault_is_retried(make: Make, number: int, times: int) -> None:
    reader, fake = make(*[fault(number)] * times)
    assert np.array_equal(read(reader), expected())
    assert reader.retries == times
    assert len(fake.reads) == times + 1
    assert reader.bytes_read == 3 * PAGE


def test_a_lasting_fault_is_reported(make: Make, shard: Path) -> None:
    reader, fake = make(*[fault(errno.EIO)] * 100)
    with pytest.raises(StorageError, match=f"after {READ_ATTEMPTS} attempts.*store verify") as caught:
        read(reader)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(shard)
    assert len(fake.reads) == READ_ATTEMPTS
    assert reader.bytes_read == 0


def test_a_fault_that_no_retry_heals_is_reported_at_once(make: Make) -> None:
    reader, fake = make(*[fault(errno.EBADF)] * 100)
    with pytest.raises(StorageError) as caught:
        read(reader)
    assert caught.value.errno == errno.EBADF
    assert len(fake.reads) == 1


def test_a_short_read_at_a_page_goes_on_directly(make: Make) -> None:
    reader, fake = make(PAGE)
    assert np.array_equal(read(reader), expected())
    assert fake.reads == [(True, PAGE, 3 * PAGE), (True, 2 * PAGE, 2 * PAGE)]
    assert reader.retries == 1


@pytest.mark.parametrize("stops", [(1,), (PAGE - 1,), (PAGE + 512,), (100, 5000, 3), (PAGE, 1, 1)])
def test_a_short_read_inside_a_page_goes_on_buffered(make: Make, stops: tuple[int, ...]) -> None:
    reader, fake = make(*stops)
    assert np.array_equal(read(reader), expected())
    position = PAGE
    buffered = False
    for (direct, offset, nbytes), stop in zip(fake.reads, (*stops, 3 * PAGE), strict=True):
        assert (direct, offset, nbytes) == (not buffered, position, 4 * PAGE - position)
        position += stop
        buffered = buffered or position % PAGE != 0
    assert reader.direct, "one short read does not end direct reading"
    assert np.array_equal(read(reader), expected())
    assert fake.reads[-1] == (True, PAGE, 3 * PAGE)


def test_faults_and_short_reads_mixed(make: Make) -> None:
    reader, _ = make(fault(errno.EIO), PAGE, fault(errno.EIO), 7, 0, fault(errno.EINTR), 9)
    with pytest.raises(StorageError):
        # Four fruitless attempts in one read are too many, with progress between them or not.
        read(reader)
    reader, _ = make(fault(errno.EIO), PAGE, 7, 0, fault(errno.EINTR), 9)
    assert np.array_equal(read(reader), expected())


def test_a_shard_that_ends_early_is_corrupt(make: Make, shard: Path) -> None:
    os.truncate(shard, 2 * PAGE + 100)
    reader, _ = make()
    with pytest.raises(StoreCorruptError, match=f"ends at byte {2 * PAGE + 100}, expected at least {4 * PAGE}"):
        read(reader)


def test_nothing_read_once_is_not_yet_the_end(make: Make) -> None:
    reader, _ = make(0, 0)
    assert np.array_equal(read(reader), expected())
    assert reader.retries == 2


def test_o_direct_refused_at_opening(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = []
    monkeypatch.setattr(disk.os, "posix_fadvise", lambda _fd, *range_and_advice: dropped.append(range_and_advice))
    fake = Disk(shard, refuses=True)
    with pytest.warns(SlowReadWarning, match="shard-0 refuses O_DIRECT") as warned:
        reader = ShardReader([shard, shard], fake.open, preadv=fake.preadv)
    assert len(warned) == 1
    assert not reader.direct
    assert np.array_equal(read(reader), expected())
    assert dropped == [(PAGE, 3 * PAGE, os.POSIX_FADV_DONTNEED)]
    reader.close()


def test_o_direct_refused_at_the_first_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = []
    monkeypatch.setattr(disk.os, "posix_fadvise", lambda _fd, *range_and_advice: dropped.append(range_and_advice))
    reader, fake = make(fault(errno.EINVAL))
    with pytest.warns(SlowReadWarning, match="refuses O_DIRECT"):
        assert np.array_equal(read(reader), expected())
    assert not reader.direct
    assert dropped == [(PAGE, 3 * PAGE, os.POSIX_FADV_DONTNEED)]
    assert np.array_equal(read(reader, 0, PAGE), expected(0, PAGE))
    assert [direct for direct, _, _ in fake.reads] == [True, False, False]


def test_what_a_buffered_rest_left_in_the_page_cache_is_dropped(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = []
    monkeypatch.setattr(disk.os, "posix_fadvise", lambda _fd, *range_and_advice: dropped.append(range_and_advice))
    reader, _ = make(5)
    read(reader)
    assert dropped == [(PAGE, 3 * PAGE, os.POSIX_FADV_DONTNEED)]


def test_an_invalid_buffered_read_is_reported(make: Make) -> None:
    reader, _ = make(fault(errno.EINVAL), fault(errno.EINVAL))
    with pytest.warns(SlowReadWarning), pytest.raises(StorageError) as caught:
        read(reader)
    assert caught.value.errno == errno.EINVAL


def test_other_faults_at_opening_are_raised_and_nothing_stays_open(shard: Path) -> None:
    def open_shard(index: int, direct: bool) -> int:
        if index == 2:
            raise StorageError(errno.EMFILE, "Too many open files", str(shard))
        return fake.open(index, direct)

    fake = Disk(shard)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(StorageError, match="Too many"):
        ShardReader([shard] * 3, open_shard)
    assert set(os.listdir("/proc/self/fd")) == before


def test_closing_closes_every_descriptor_once(make: Make) -> None:
    before = set(os.listdir("/proc/self/fd"))
    reader, fake = make(3)
    read(reader)
    assert fake.opened == [True, False]
    reader.close()
    assert set(os.listdir("/proc/self/fd")) == before
    reader.close()
    with pytest.raises(ClosedError):
        read(reader)
    assert set(os.listdir("/proc/self/fd")) == before


def test_many_threads_read_at_once(make: Make) -> None:
    reader, _ = make(*([fault(errno.EIO), 100, None, PAGE] * 5))
    wrong: list[int] = []

    def work(seed: int) -> None:
        for number in range(20):
            first = (seed * 7 + number * 3) % 13
            if not np.array_equal(read(reader, first * PAGE, 3 * PAGE), expected(first * PAGE)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert reader.bytes_read == 4 * 20 * 3 * PAGE


def test_real_direct_reads(shard: Path) -> None:
    def open_shard(_index: int, direct: bool) -> int:
        return os.open(shard, os.O_RDONLY | (os.O_DIRECT if direct else 0))

    try:
        os.close(open_shard(0, True))
    except OSError:
        pytest.skip("the file system of the temporary directory has no O_DIRECT")
    reader = ShardReader([shard], open_shard)
    room = np.full(6 * PAGE, 0xA5, np.uint8)
    start = -room.ctypes.data % PAGE
    out = room[start : start + 5 * PAGE]
    reader.read(0, 2 * PAGE, memoryview(out))  # type: ignore[arg-type]
    assert reader.direct
    assert np.array_equal(out, expected(2 * PAGE, 5 * PAGE))
    assert (room[:start] == 0xA5).all()
    assert (room[start + 5 * PAGE :] == 0xA5).all()
    reader.close()
