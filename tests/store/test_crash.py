"""A process killed at any system call leaves no store or a whole one, and the next conversion succeeds."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload.errors import StoreBusyError
from offload.store import ExpertStore, convert, find, list_stores, remove_store
from tests.store.faults import Calls, exit_code, in_child
from tests.store.sources import GROUPS, IDENTITY, SHARD_NBYTES, SeededSource, assert_whole

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
KILLED = 9
LIMIT = 200  # more calls than a conversion makes: the loops end before


def dying_at(last: int, torn: bool, body: Callable[[], object]) -> int:
    """Run `body` in a child that dies before its call number `last`, or half-way through it where it writes."""

    def before(number: int, name: str, args: tuple[Any, ...]) -> None:
        if number < last:
            return
        if torn and name == "pwrite":
            fd, data, offset = args
            os.set_blocking(fd, True)
            half = len(data) // 2 // 4096 * 4096
            os.pwrite(fd, data[:half], offset)
        os._exit(KILLED)

    def child() -> None:
        with pytest.MonkeyPatch.context() as patch:
            Calls(before).install(patch)
            body()

    return exit_code(in_child(child))


def convert_small(root: Path) -> ExpertStore:
    return convert(SeededSource(), root, shard_nbytes=SHARD_NBYTES)


def assert_absent_or_whole(root: Path) -> None:
    store = find(root, IDENTITY, "bf16")
    if store is not None:
        assert_whole(store, SeededSource())
    for info in list_stores(root):
        assert info.status in ("complete", "incomplete"), info
        assert (info.status == "complete") == (info.path.name[0] != ".")


def assert_converts(root: Path) -> None:
    store = convert_small(root)
    assert_whole(store, SeededSource())


@pytest.mark.parametrize("torn", [False, True], ids=["before", "half-way"])
def test_killed_at_every_call(tmp_path: Path, torn: bool) -> None:
    for last in range(1, LIMIT):
        root = tmp_path / str(last)
        code = dying_at(last, torn, lambda root=root: convert_small(root))
        assert_absent_or_whole(root)
        if code == 0:
            break
        assert code == KILLED
        assert_converts(root)
        visible = [entry.name for entry in root.iterdir() if not entry.name.endswith(".lock")]
        assert visible == [info.key for info in list_stores(root) if info.status == "complete"]
    # Shards, manifest, marker and lock: a loop that ended early would prove nothing.
    assert last > 30


def test_killed_again_and_again_over_what_is_left(tmp_path: Path) -> None:
    codes = []
    for last in range(1, LIMIT):
        codes.append(dying_at(last, True, lambda: convert_small(tmp_path)))
        assert_absent_or_whole(tmp_path)
        if codes[-1] == 0:
            break
    assert codes[-1] == 0
    assert len(codes) > 30
    assert_converts(tmp_path)


def test_a_removal_killed_at_every_call(tmp_path: Path) -> None:
    for last in range(1, LIMIT):
        root = tmp_path / str(last)
        key = convert_small(root).path.name
        code = dying_at(last, False, lambda root=root, key=key: remove_store(root, key))
        assert_absent_or_whole(root)
        if code == 0:
            assert list_stores(root) == []
            break
        assert_converts(root)
    assert last > 8


def test_leftovers_are_listed_and_removed_whatever_is_converted_next(tmp_path: Path) -> None:
    assert dying_at(25, False, lambda: convert_small(tmp_path)) == KILLED
    (left,) = list_stores(tmp_path)
    assert (left.status, left.name, left.format) == ("incomplete", "Org/Tiny-MoE", "bf16")
    assert left.nbytes > 0
    assert "did not end" in left.detail
    convert(SeededSource(groups=GROUPS[:1], identity="f" * 64), tmp_path)
    assert [info.status for info in list_stores(tmp_path)] == ["complete"]


def test_a_leftover_can_be_removed_by_hand(tmp_path: Path) -> None:
    assert dying_at(25, False, lambda: convert_small(tmp_path)) == KILLED
    (left,) = list_stores(tmp_path)
    remove_store(tmp_path, left.key)
    assert list(tmp_path.iterdir()) == []


def test_of_two_processes_one_writes(tmp_path: Path) -> None:
    filled = tmp_path / "filled"
    filled.touch()

    def fill() -> None:
        with filled.open("ab") as log:
            log.write(b"x")
        time.sleep(0.005)

    def child() -> None:
        store = convert(SeededSource(on_fill=fill), tmp_path / "root", shard_nbytes=SHARD_NBYTES)
        assert_whole(store, SeededSource())

    children = [in_child(child) for _ in range(4)]
    assert [exit_code(pid) for pid in children] == [0] * 4
    assert filled.stat().st_size == sum(group.count for group in GROUPS)
    assert [info.status for info in list_stores(tmp_path / "root")] == ["complete"]
    assert len(list((tmp_path / "root").iterdir())) == 1


class Held:
    """A child that holds the store's lock, in the middle of its conversion, until it is killed or let go."""

    def __init__(self, root: Path) -> None:
        started, self._started = os.pipe()
        self._go, go = os.pipe()

        def wait() -> None:
            os.write(self._started, b"x")
            os.read(self._go, 1)

        self.pid = in_child(lambda: convert(SeededSource(on_fill=wait), root, shard_nbytes=SHARD_NBYTES))
        os.read(started, 1)
        self._fds = (started, self._started, self._go, go)

    def let_go(self) -> None:
        os.write(self._fds[3], b"x" * 100)

    def close(self) -> int:
        for fd in self._fds:
            os.close(fd)
        return exit_code(self.pid)


def test_busy_names_the_holder(tmp_path: Path) -> None:
    held = Held(tmp_path)
    events = []

    class Progress:
        def start(self, total_bytes: int, description: str) -> None:
            events.append((total_bytes, description))

        def advance(self, nbytes: int) -> None:
            raise AssertionError

        def finish(self) -> None:
            events.append("finish")

    with pytest.raises(StoreBusyError, match=f"process {held.pid} "):
        convert(SeededSource(), tmp_path, progress=Progress(), timeout_seconds=0.1)
    assert events == [(0, f"waiting for process {held.pid}, which converts Org/Tiny-MoE"), "finish"]
    (info,) = list_stores(tmp_path)
    assert (info.status, info.detail) == ("incomplete", f"process {held.pid} is at work on it")
    with pytest.raises(StoreBusyError):
        remove_store(tmp_path, info.key)
    # Another model's conversion does not wait, and leaves what is being written alone.
    convert(SeededSource(groups=GROUPS[:1], identity="f" * 64), tmp_path)
    held.let_go()
    assert held.close() == 0
    assert_whole(convert(SeededSource(), tmp_path, timeout_seconds=0), SeededSource())


def test_the_next_takes_over_from_a_killed_holder(tmp_path: Path) -> None:
    held = Held(tmp_path)
    waiting = in_child(lambda: assert_converts(tmp_path))
    time.sleep(0.1)
    os.kill(held.pid, signal.SIGKILL)
    assert held.close() == -signal.SIGKILL
    assert exit_code(waiting) == 0
    assert_whole(convert_small(tmp_path), SeededSource())
