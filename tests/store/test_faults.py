"""A disk that is full, read-only or failing gives a typed error and leaves nothing that looks like a store."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from offload.errors import DoesNotFitError, StorageError
from offload.store import ExpertStore, convert, files, find, list_stores, remove_store, verify
from tests.store.faults import CHANGING_CALLS, Calls, exit_code, in_child
from tests.store.sources import IDENTITY, SHARD_NBYTES, SeededSource, assert_whole

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
LIMIT = 200


def convert_small(root: Path) -> ExpertStore:
    return convert(SeededSource(), root, shard_nbytes=SHARD_NBYTES)


def failing(code: int, first: int, last: int, names: tuple[str, ...] = CHANGING_CALLS) -> Calls:
    """Calls that fail with an errno from number `first` to number `last`."""

    def before(number: int, name: str, args: tuple[Any, ...]) -> None:
        if first <= number <= last:
            raise OSError(code, os.strerror(code))

    return Calls(before, names)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full", "failing"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from-then-on"])
def test_a_fault_at_every_call(tmp_path: Path, code: int, lasting: bool) -> None:
    raised = 0
    for number in range(1, LIMIT):
        root = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            calls = failing(code, number, LIMIT if lasting else number).install(patch)
            try:
                convert_small(root)
            except StorageError as error:
                raised += 1
                assert error.errno == code
                assert str(root) in str(error)
            if len(calls.log) < number:
                break
        store = find(root, IDENTITY, "bf16")
        if store is not None:
            assert_whole(store, SeededSource())
        if not lasting:
            assert [info.status for info in list_stores(root)] in ([], ["complete"], ["incomplete"])
        assert_whole(convert_small(root), SeededSource())
        assert [info.status for info in list_stores(root)] == ["complete"]
    assert raised > 30


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_removes_what_was_written(tmp_path: Path, code: int) -> None:
    for number in range(1, LIMIT):
        root = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            calls = failing(code, number, number, ("pwrite", "fsync", "rename")).install(patch)
            try:
                convert_small(root)
                ended_well = True
            except StorageError:
                ended_well = False
        if len(calls.log) < number:
            break
        # The pid in the lock file is not needed; the last call makes the name of a whole store durable.
        name, target = calls.log[number - 1]
        assert ended_well == target.name.endswith(".lock")
        if ended_well or (name, target) == ("fsync", root):
            assert_whole(ExpertStore.open(list_stores(root)[0].path), SeededSource())
        else:
            assert list(root.iterdir()) == []
    assert number > 20


def test_a_store_can_be_removed_from_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = convert_small(tmp_path).path.name
    failing(errno.ENOSPC, 1, LIMIT, ("pwrite",)).install(monkeypatch)
    remove_store(tmp_path, key)
    assert list(tmp_path.iterdir()) == []


def test_descriptors_are_closed_after_faults(tmp_path: Path) -> None:
    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    for number in range(1, 70):
        with pytest.MonkeyPatch.context() as patch:
            failing(errno.EIO, number, number).install(patch)
            with contextlib.suppress(StorageError):
                convert_small(tmp_path / str(number))
        assert opened() == before
    assert verify(convert_small(tmp_path)) == []
    assert opened() == before


def test_a_write_that_the_system_cuts_short(tmp_path: Path) -> None:
    def child() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (22_000, 22_000))
        with pytest.raises(StorageError, match=r"experts-0000\d-of-\d+.safetensors: "):
            convert_small(tmp_path)
        assert list(tmp_path.iterdir()) == []

    assert exit_code(in_child(child)) == 0
    assert_whole(convert_small(tmp_path), SeededSource())


def test_a_read_only_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = convert_small(tmp_path)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    open_file = files.open_file

    def read_only(path: Path, flags: int) -> int:
        if flags & writing:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return open_file(path, flags)

    monkeypatch.setattr(files, "open_file", read_only)
    # A store that is there can be used.
    assert convert_small(tmp_path).path == store.path
    with pytest.raises(StorageError, match="read-only; use a directory that can be written"):
        convert(SeededSource(identity="f" * 64), tmp_path)


def test_a_root_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)

    def child() -> None:
        # Relative: another user may not walk down to a directory of this one's.
        os.chdir(tmp_path)
        if os.geteuid() == 0:
            os.seteuid(65534)
        for root in (Path(), Path("below")):
            with pytest.raises(StorageError, match="may read and write"):
                convert_small(root)

    assert exit_code(in_child(child)) == 0
    tmp_path.chmod(0o755)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1000
    monkeypatch.setattr(files, "free_nbytes", lambda _: free)
    with pytest.raises(DoesNotFitError, match="offload store ls") as caught:
        convert_small(tmp_path)
    assert list(tmp_path.iterdir()) == []
    minimum = caught.value.minimum_disk_bytes
    free = minimum - 1
    with pytest.raises(DoesNotFitError):
        convert_small(tmp_path)
    free = minimum
    store = convert_small(tmp_path)
    assert sum(entry.stat().st_blocks * 512 for entry in store.path.iterdir()) <= minimum


def test_verify_reports_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = convert_small(tmp_path)
    location = store.location(1, 2)
    preadv = files.preadv

    def fail(fd: int, out: memoryview, offset: int) -> int:
        if offset == location.offset and Path(f"/proc/self/fd/{fd}").readlink() == store.shard_paths[location.shard]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, out, offset)

    monkeypatch.setattr(files, "preadv", fail)
    (problem,) = verify(store)
    assert problem.tensor == "model.layers.1.mlp.experts.2"
    assert "Input/output error" in problem.message


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = convert_small(tmp_path)
    preadv = files.preadv
    monkeypatch.setattr(files, "preadv", lambda fd, out, offset: preadv(fd, out[:1001], offset))
    assert verify(store) == []
