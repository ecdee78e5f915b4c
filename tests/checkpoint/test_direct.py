import errno
import os
import random
import threading
import warnings

import numpy as np
import pytest

from offload.checkpoint import direct, files
from offload.checkpoint.direct import DirectReader
from offload.checkpoint.files import READ_ATTEMPTS, open_regular
from offload.errors import CheckpointChangedError, SlowReadWarning, StorageError

NBYTES = 5 * 4096 + 123


@pytest.fixture
def content():
    return random.Random(0).randbytes(NBYTES)


@pytest.fixture
def opened(tmp_path, content):
    path = tmp_path / "data"
    path.write_bytes(content)
    descriptor, _ = open_regular(path)
    yield descriptor, str(path)
    os.close(descriptor)


@pytest.fixture
def reader(monkeypatch):
    monkeypatch.setattr(files, "FIRST_RETRY_SECONDS", 0.0)
    reader = DirectReader()
    yield reader
    reader.close()


def refuse_direct(monkeypatch, where):
    """O_DIRECT fails at the open or at the read."""
    real_open, real_preadv, refused = os.open, os.preadv, set()

    def opening(path, flags, *rest, **named):
        if flags & os.O_DIRECT and where == "open":
            raise OSError(errno.EINVAL, "no")
        descriptor = real_open(path, flags, *rest, **named)
        (refused.add if flags & os.O_DIRECT else refused.discard)(descriptor)
        return descriptor

    def preadv(descriptor, buffers, offset):
        if descriptor in refused:
            raise OSError(errno.EINVAL, "no")
        return real_preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "preadv", preadv)


def read(reader, opened, offset, nbytes):
    """The bytes at an offset, read between guards."""
    guarded = bytearray(b"\xaa" * (nbytes + 20))
    reader.read(opened[0], memoryview(guarded)[10:-10], offset, opened[1])
    assert guarded[:10] == guarded[-10:] == b"\xaa" * 10
    return bytes(guarded[10:-10])


@pytest.mark.parametrize("scratch", [4096, 8192, direct.SCRATCH_NBYTES])
@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, 4096), (0, NBYTES), (1, 1), (4095, 2), (4096, 4096), (123, 3 * 4096), (NBYTES - 1, 1), (4097, NBYTES - 4097)],
)
def test_any_range(reader, opened, content, monkeypatch, scratch, offset, nbytes):
    monkeypatch.setattr(direct, "SCRATCH_NBYTES", scratch)
    assert read(reader, opened, offset, nbytes) == content[offset : offset + nbytes]


@pytest.mark.parametrize("short", [4096, 8192, 512, 1])
def test_short_reads_are_continued(reader, opened, content, monkeypatch, short):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: min(real(fd, buffers, offset), short))
    assert read(reader, opened, 100, NBYTES - 100) == content[100:]


def test_past_the_end(reader, opened):
    with pytest.raises(CheckpointChangedError, match="found the end of the file after 0"):
        read(reader, opened, 4000, NBYTES)


def test_errors(reader, opened, content, monkeypatch):
    read(reader, opened, 0, 1)
    real, failures = os.preadv, [errno.EIO] * (READ_ATTEMPTS - 1)

    def preadv(descriptor, buffers, offset):
        if failures:
            raise OSError(failures.pop(), "no")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert read(reader, opened, 0, 100) == content[:100]
    failures += [errno.EIO] * READ_ATTEMPTS
    with pytest.raises(StorageError, match="data"):
        read(reader, opened, 0, 100)
    assert read(reader, opened, 0, 100) == content[:100]


@pytest.mark.parametrize("where", ["open", "read"])
def test_without_direct_io_pages_are_given_back(reader, opened, content, monkeypatch, where):
    refuse_direct(monkeypatch, where)
    dropped = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: dropped.append(arguments))
    with pytest.warns(SlowReadWarning, match="data: the file system refuses O_DIRECT"):
        assert read(reader, opened, 5, 5000) == content[5:5005]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(reader, opened, 0, 10) == content[:10]
    assert dropped == [(opened[0], 5, 5000, os.POSIX_FADV_DONTNEED), (opened[0], 0, 10, os.POSIX_FADV_DONTNEED)]


def test_an_error_before_the_first_read_is_not_taken_for_a_refusal(reader, opened, content, monkeypatch):
    real, failures = os.preadv, [errno.EIO]

    def preadv(descriptor, buffers, offset):
        if failures:
            raise OSError(failures.pop(), "no")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(reader, opened, 0, 100) == content[:100]
        assert read(reader, opened, 0, 100) == content[:100]


def test_reads_the_file_that_was_opened(reader, opened, content, tmp_path):
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "data").write_bytes(bytes(NBYTES))
    assert read(reader, opened, 0, NBYTES) == content


def test_many_threads(reader, opened, content):
    wrong = []

    def many(seed):
        generator = random.Random(seed)
        for _ in range(50):
            offset = generator.randrange(NBYTES)
            nbytes = generator.randrange(1, NBYTES - offset + 1)
            if read(reader, opened, offset, nbytes) != content[offset : offset + nbytes]:
                wrong.append((seed, offset, nbytes))

    threads = [threading.Thread(target=many, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_close_gives_the_files_back(opened):
    reader = DirectReader()
    before = len(os.listdir("/proc/self/fd"))
    read(reader, opened, 0, 1)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_into_memory_of_numpy(reader, opened, content):
    out = np.full(1000, 0xAA, dtype=np.uint8)
    reader.read(opened[0], out.data, 7, opened[1])
    assert out.tobytes() == content[7:1007]
