from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from cpu_kernels import threads
from cpu_kernels.jit import carray, task_address
from cpu_kernels.simd import int64_pointer
from cpu_kernels.threads import ThreadPool, default_threads
from formats.bundle import BundleLayout
from tests.cpu_kernels.experts import random_call
from tests.cpu_kernels.test_expert_mlp import run

CHUNKS = 1000


def _count(job, chunk):
    # Every chunk has a counter of its own.
    counters = carray(int64_pointer(job), (CHUNKS,))
    counters[chunk] += 1


@pytest.fixture(scope="module")
def count() -> int:
    return task_address(_count)


def phases(task: int, counters: np.ndarray, *chunks: int) -> np.ndarray:
    return np.array([[task, counters.ctypes.data, number] for number in chunks], np.int64)


@pytest.mark.parametrize("spin_us", [0, 20, 1000])
@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_every_chunk_of_every_phase_runs_once(count: int, number: int, spin_us: float) -> None:
    counters = np.zeros(CHUNKS, np.int64)
    with ThreadPool(number, spin_us=spin_us) as pool:
        for _ in range(100):
            pool.run(phases(count, counters, CHUNKS, 0, 1, 2, CHUNKS))
    assert counters[:3].tolist() == [400, 300, 200]
    assert (counters[2:] == 200).all()


@pytest.mark.parametrize("spin_us", [0, 50])
def test_calls_around_the_moment_when_workers_fall_asleep(count: int, spin_us: float) -> None:
    counters = np.zeros(CHUNKS, np.int64)
    with ThreadPool(4, spin_us=spin_us) as pool:
        for turn in range(2000):
            pool.run(phases(count, counters, 5, 3))
            end = time.perf_counter() + 1e-6 * (turn % 80)
            while time.perf_counter() < end:
                pass
    assert counters[:6].tolist() == [4000, 4000, 4000, 2000, 2000, 0]


def test_calls_from_four_python_threads_at_once() -> None:
    calls = [random_call(BundleLayout(128, 64, "bf16"), [1, 3, 0, 2], seed) for seed in range(4)]
    alone = [run(call, threads=1) for call in calls]
    wrong: list[int] = []
    with ThreadPool(3) as pool:

        def work(index: int) -> None:
            for _ in range(100):
                if not np.array_equal(run(calls[index], threads=pool), alone[index]):
                    wrong.append(index)

        callers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert wrong == []


def test_a_forked_child_computes_and_so_does_its_parent() -> None:
    # In a process of its own: pytest's process holds threads of torch, which a fork with warnings as errors reports.
    script = """
import os, sys
import numpy as np
from cpu_kernels.threads import ThreadPool
from formats.bundle import BundleLayout
from tests.cpu_kernels.experts import random_call
from tests.cpu_kernels.test_expert_mlp import run

call = random_call(BundleLayout(512, 64, "fp32"), [1, 3])
pool = ThreadPool(3)
expected = run(call, threads=pool)
child = os.fork()
if child == 0:
    same = all(np.array_equal(run(call, threads=pool), expected) for _ in range(20))
    os._exit(0 if same else 1)
same = all(np.array_equal(run(call, threads=pool), expected) for _ in range(20))
_, status = os.waitpid(child, 0)
sys.exit(0 if same and status == 0 else 1)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


def test_an_interpreter_ends_while_workers_sleep_or_spin() -> None:
    script = """
import numpy as np
from cpu_kernels.threads import ThreadPool
from formats.bundle import BundleLayout
from tests.cpu_kernels.experts import random_call
from tests.cpu_kernels.test_expert_mlp import run

call = random_call(BundleLayout(64, 64, "fp32"), [1])
pools = [ThreadPool(3, spin_us=spin) for spin in (0, 10_000)]
for pool in pools:
    run(call, threads=pool)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)


def test_close_joins_the_workers_and_ends_the_pool(count: int) -> None:
    before = threading.active_count()
    pool = ThreadPool(4)
    counters = np.zeros(CHUNKS, np.int64)
    pool.run(phases(count, counters, 10))
    assert threading.active_count() == before + 3
    pool.close()
    pool.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        pool.run(phases(count, counters, 10))


def test_a_pool_that_nobody_called_has_no_threads() -> None:
    before = threading.active_count()
    with ThreadPool(4):
        assert threading.active_count() == before


@pytest.mark.parametrize("number", [0, -1, 2.0, True, 5000, "2"])
def test_numbers_of_threads_that_cannot_be_meant(number: object) -> None:
    with pytest.raises(ValueError, match="threads="):
        ThreadPool(number)  # type: ignore[arg-type]


def test_a_spin_that_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match="spin_us"):
        ThreadPool(1, spin_us=-1)


def test_the_environment_sets_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(threads.THREADS_VARIABLE, "5")
    assert default_threads() == 5
    assert ThreadPool().threads == 5
    for wrong in ("0", "-2", "two", "1.5", "100000"):
        monkeypatch.setenv(threads.THREADS_VARIABLE, wrong)
        with pytest.raises(ValueError, match=threads.THREADS_VARIABLE):
            default_threads()


@pytest.mark.parametrize(("granted", "expected"), [(None, 4), (8.0, 4), (2.5, 2), (0.3, 1)])
def test_the_control_group_limits_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, granted: float | None, expected: int
) -> None:
    monkeypatch.delenv(threads.THREADS_VARIABLE, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "_cgroup_cpus", lambda: granted)
    assert default_threads() == expected
