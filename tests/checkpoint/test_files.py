import errno
import os

import pytest

from offload.checkpoint import files
from offload.checkpoint.files import READ_ATTEMPTS, open_regular, read_exactly, read_small
from offload.errors import CheckpointChangedError, CheckpointError, StorageError


@pytest.fixture
def opened(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 40)
    descriptor, _ = open_regular(path)
    yield descriptor, path
    os.close(descriptor)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(files, "FIRST_RETRY_SECONDS", 0.0)


def failing_preadv(monkeypatch, error, times):
    real, calls = os.preadv, []

    def preadv(descriptor, buffers, offset):
        calls.append(offset)
        if len(calls) <= times:
            raise OSError(error, os.strerror(error))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return calls


@pytest.mark.parametrize("drop_cache", [False, True])
@pytest.mark.parametrize("chunk", [1 << 20, 1000, 7])
def test_reads_across_chunks(opened, monkeypatch, chunk, drop_cache):
    descriptor, path = opened
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk)
    buffer = bytearray(b"\xaa" * 5000)
    read_exactly(descriptor, memoryview(buffer), 123, path, drop_cache=drop_cache)
    assert bytes(buffer) == path.read_bytes()[123:5123]


def test_short_reads_are_continued(opened, monkeypatch):
    descriptor, path = opened
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:3]], offset))
    buffer = bytearray(100)
    read_exactly(descriptor, memoryview(buffer), 50, path)
    assert bytes(buffer) == path.read_bytes()[50:150]


@pytest.mark.parametrize("error", [errno.EIO, errno.EINTR])
def test_passing_errors_are_retried(opened, monkeypatch, error):
    descriptor, path = opened
    failing_preadv(monkeypatch, error, READ_ATTEMPTS - 1)
    buffer = bytearray(100)
    read_exactly(descriptor, memoryview(buffer), 0, path)
    assert bytes(buffer) == path.read_bytes()[:100]


def test_lasting_error_names_file_and_offset(opened, monkeypatch):
    descriptor, path = opened
    calls = failing_preadv(monkeypatch, errno.EIO, 10**9)
    with pytest.raises(StorageError, match="offset 77") as caught:
        read_exactly(descriptor, memoryview(bytearray(4)), 77, path)
    assert str(path) in str(caught.value)
    assert caught.value.errno == errno.EIO
    assert len(calls) == READ_ATTEMPTS


def test_error_that_will_not_pass_is_not_retried(opened, monkeypatch):
    descriptor, path = opened
    calls = failing_preadv(monkeypatch, errno.EBADF, 10**9)
    with pytest.raises(StorageError):
        read_exactly(descriptor, memoryview(bytearray(4)), 0, path)
    assert len(calls) == 1


def test_file_that_became_shorter(opened):
    descriptor, path = opened
    os.truncate(path, 100)
    with pytest.raises(CheckpointChangedError, match="shorter") as caught:
        read_exactly(descriptor, memoryview(bytearray(50)), 80, path)
    assert str(path) in str(caught.value)


def test_small_file_has_a_limit(tmp_path):
    path = tmp_path / "index"
    path.write_bytes(b"x" * 100)
    assert read_small(path, 100) == b"x" * 100
    with pytest.raises(CheckpointError, match="at most 99"):
        read_small(path, 99)
