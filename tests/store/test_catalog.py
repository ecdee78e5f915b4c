from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from offload.errors import InvalidArgumentError, StoreBusyError, StoreError
from offload.store import ExpertStore, convert, files, list_stores, remove_store
from offload.store.locks import store_lock
from offload.store.names import key_of_store
from tests.store.faults import exit_code, in_child
from tests.store.sources import GROUPS, IDENTITY, SeededSource, assert_whole

KEY = f"{IDENTITY[:16]}-bf16"


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    return convert(SeededSource(), tmp_path)


def test_a_store_is_listed_as_it_is(store: ExpertStore, tmp_path: Path) -> None:
    # Neither of these is a store.
    (tmp_path / "notes.txt").write_bytes(b"x")
    (tmp_path / "hub").mkdir()
    (tmp_path / f"link-{key_of_store(store.path.name)}").symlink_to(store.path)
    (info,) = list_stores(tmp_path)
    assert info.key == "Org-Tiny-MoE-0123456789abcdef-bf16"
    assert (info.path, info.name, info.format) == (store.path, "Org/Tiny-MoE", "bf16")
    assert (info.nbytes, info.status, info.detail) == (store.nbytes, "complete", "")
    assert abs(info.created_unix - time.time()) < 60


def test_listing_where_nothing_is(tmp_path: Path) -> None:
    assert list_stores(tmp_path) == []
    assert list_stores(tmp_path / "missing") == []
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgumentError):
        list_stores(tmp_path / "file")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert(SeededSource(groups=GROUPS[:1]), "~/stores").path.parent == tmp_path / "stores"


def test_removal_leaves_the_others(store: ExpertStore, tmp_path: Path) -> None:
    other = convert(SeededSource(identity="f" * 64), tmp_path)
    remove_store(tmp_path, store.path.name)
    assert [info.key for info in list_stores(tmp_path)] == [other.path.name]
    assert_whole(other, SeededSource(identity="f" * 64))
    assert [entry.name for entry in tmp_path.iterdir()] == [other.path.name]


@pytest.mark.parametrize("key", ["", ".", "..", "../outside", "/etc", "hub", "Org-Tiny-MoE"])
def test_only_stores_are_removed(store: ExpertStore, tmp_path: Path, key: str) -> None:
    (tmp_path / "hub").mkdir()
    with pytest.raises(InvalidArgumentError, match=store.path.name):
        remove_store(tmp_path, key)
    assert_whole(store, SeededSource())


def test_a_directory_with_strange_files_is_not_removed(store: ExpertStore, tmp_path: Path) -> None:
    (store.path / "thesis.txt").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"thesis\.txt"):
        remove_store(tmp_path, store.path.name)
    assert_whole(store, SeededSource())


def test_a_locked_store_is_not_removed(store: ExpertStore, tmp_path: Path) -> None:
    key = key_of_store(store.path.name)
    assert key is not None
    with store_lock(tmp_path, key, timeout_seconds=0), pytest.raises(StoreBusyError, match=f"process {os.getpid()} "):
        remove_store(tmp_path, store.path.name)
    assert_whole(store, SeededSource())


def test_a_reader_keeps_what_it_opened(store: ExpertStore, tmp_path: Path) -> None:
    location = store.location(1, 0)
    fd = store.open_shard(location.shard, direct=False)
    remove_store(tmp_path, store.path.name)
    try:
        assert os.pread(fd, location.nbytes, location.offset) == SeededSource().bundle(1, 0).tobytes()
    finally:
        os.close(fd)


def test_the_lock_file_goes_with_the_lock(tmp_path: Path) -> None:
    for _ in range(2):
        with store_lock(tmp_path, KEY, timeout_seconds=0):
            assert [entry.name for entry in tmp_path.iterdir()] == [f".{KEY}.lock"]
        assert list(tmp_path.iterdir()) == []


def test_waiting_ends_when_the_holder_lets_go(tmp_path: Path) -> None:
    waited = []
    first = store_lock(tmp_path, KEY, timeout_seconds=0)
    first.__enter__()

    def release(holder: int | None) -> None:
        waited.append(holder)
        first.__exit__(None, None, None)

    with store_lock(tmp_path, KEY, timeout_seconds=5, on_wait=release):
        assert waited == [os.getpid()]


def test_a_lock_file_unlinked_before_it_was_locked_is_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = files.open_file
    opened = []

    def open_then_lose_the_first(path: Path, flags: int) -> int:
        fd = open_file(path, flags)
        opened.append(fd)
        if len(opened) == 1:
            path.unlink()
        return fd

    monkeypatch.setattr(files, "open_file", open_then_lose_the_first)
    with store_lock(tmp_path, KEY, timeout_seconds=0):
        assert len(opened) == 2
        with pytest.raises(StoreBusyError), store_lock(tmp_path, KEY, timeout_seconds=0):
            pass


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError

    # Else the lock that is asked for next would be another file's.
    monkeypatch.setattr(files, "unlink", refuse)
    with store_lock(tmp_path, KEY, timeout_seconds=0):
        child = in_child(lambda: time.sleep(60))
    try:
        with store_lock(tmp_path, KEY, timeout_seconds=0):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL
