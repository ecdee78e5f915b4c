"""Several models, forks, and models that nobody closes."""

from __future__ import annotations

import gc
import os
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import offload
from tests.conftest import TinyCheckpoint
from tests.hf.reference import greedy, prompt, reference_model


def _reader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("offload-reader")}


def _open_files(under: Path) -> int:
    links = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
    return sum(link.startswith(str(under)) for link in links)


def _in_child(check: Callable[[], None]) -> None:
    """Run `check` in a forked child; fail if it fails, hangs or crashes there."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            check()
            code = 0
        except BaseException:  # noqa: BLE001 - the parent sees the exit code
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = threading.Timer(60, os.kill, (pid, 9))
    deadline.start()
    _, status = os.waitpid(pid, 0)
    deadline.cancel()
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.fixture
def tight(tiny_checkpoint: TinyCheckpoint) -> tuple[Path, int]:
    directory = tiny_checkpoint("qwen3_moe")
    plan = offload.plan(directory, ram="1GiB", context=64)
    return directory, plan.minimum_ram_nbytes + 3 * plan.slot_nbytes


def test_two_models_at_once_and_one_closed(
    tight: tuple[Path, int], tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    directory, ram = tight
    other_directory = tiny_checkpoint("gpt_oss")
    ids = prompt()
    first = offload.load(directory, ram=ram, nvme=store_root, context=64)
    again = offload.load(directory, ram=ram, nvme=store_root, context=64)
    other = offload.load(other_directory, ram="1GiB", nvme=store_root, context=64)
    expected = greedy(reference_model(directory, torch.float32), ids)
    expected_other = greedy(reference_model(other_directory, torch.float32), ids)
    assert torch.equal(greedy(first, ids), expected)
    assert torch.equal(greedy(other, ids), expected_other)
    first.offload.close()
    assert torch.equal(greedy(again, ids), expected)
    assert torch.equal(greedy(other, ids), expected_other)
    again.offload.close()
    other.offload.close()


def test_a_model_that_nobody_closes_is_collected(tight: tuple[Path, int], store_root: Path) -> None:
    directory, ram = tight
    gc.collect()
    before = _reader_threads()
    model = offload.load(directory, ram=ram, nvme=store_root, context=64)
    greedy(model, prompt(), 3)
    readers = _reader_threads() - before
    assert readers
    assert _open_files(store_root) > 0
    gone = weakref.ref(model.offload.tier.arena)
    del model
    gc.collect()
    assert gone() is None
    # Readers are stopped and files closed by a thread of their own, which started when the model was collected.
    deadline = time.monotonic() + 60
    while (readers & _reader_threads() or _open_files(store_root)) and time.monotonic() < deadline:
        gc.collect()
    assert not readers & _reader_threads()
    assert _open_files(store_root) == 0


def test_parent_and_forked_children_generate_the_same(tight: tuple[Path, int], store_root: Path) -> None:
    directory, ram = tight
    model = offload.load(directory, ram=ram, nvme=store_root, context=64)
    ids = prompt()
    expected = greedy(model, ids)

    def check() -> None:
        assert torch.equal(greedy(model, ids), expected)
        model.offload.check()

    for _ in range(2):
        _in_child(check)
    assert torch.equal(greedy(model, ids), expected)
    model.offload.check()
    model.offload.close()


def test_a_fork_while_another_thread_generates(tight: tuple[Path, int], store_root: Path) -> None:
    directory, ram = tight
    model = offload.load(directory, ram=ram, nvme=store_root, context=64)
    ids = prompt()
    expected = greedy(model, ids)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            assert torch.equal(greedy(model, ids), expected)

    def check() -> None:
        model.offload.check()
        assert torch.equal(greedy(model, ids), expected)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(5):
            _in_child(check)
    finally:
        stop.set()
        thread.join()
    model.offload.check()
    model.offload.close()
