"""Threads for kernels: persistent workers that the calling thread joins, woken without the GIL.

A phase is a compiled task with a number of chunks. Threads take chunks as they become free, so which thread
computes a chunk differs from run to run; a task whose chunks are independent gives the same bits for any number of
threads.

Between phases a worker spins for `spin_us`, then sleeps. The spin has to bridge the gap between two phases of one
call (about a microsecond). It is kept short because a spinning worker takes its core away from whatever runs
between two calls, such as the threads of torch. The same holds the other way: libgomp's threads spin for
milliseconds after a parallel region of torch unless OMP_WAIT_POLICY=passive is set before torch is loaded.

Pools survive `os.fork`: the child starts its own workers at its first call. At the end of the interpreter workers
are stopped and joined.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable

    from cpu_kernels.launch import Launcher

THREADS_VARIABLE = "OFFLOAD_CPU_THREADS"
MAX_THREADS = 1024
DEFAULT_SPIN_US = 20.0

_STATE_ALIGNMENT_BYTES = 128
_pools: weakref.WeakSet[ThreadPool] = weakref.WeakSet()


def _cgroup_cpus() -> float | None:
    """CPUs that the control group grants, None without a limit."""
    for limit, period in (
        ("/sys/fs/cgroup/cpu.max", None),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        try:
            words = Path(limit).read_text().split()
            words += Path(period).read_text().split() if period else []
            quota, interval = words[0], int(words[1])
        except (OSError, IndexError, ValueError):
            continue
        if quota not in ("max", "-1") and interval > 0:
            return int(quota) / interval
    return None


def default_threads() -> int:
    """OFFLOAD_CPU_THREADS, else the CPUs that this process may use: its affinity within its control group's quota.

    Raises:
        ValueError: OFFLOAD_CPU_THREADS is not a whole number from 1 to MAX_THREADS.
    """
    forced = os.environ.get(THREADS_VARIABLE)
    if forced:
        if not forced.isdecimal() or not 1 <= int(forced) <= MAX_THREADS:
            raise ValueError(f"{THREADS_VARIABLE}={forced!r}: expected a whole number from 1 to {MAX_THREADS}")
        return int(forced)
    cpus = len(os.sched_getaffinity(0))
    granted = _cgroup_cpus()
    if granted is not None:
        cpus = min(cpus, max(1, int(granted)))
    return min(cpus, MAX_THREADS)


class Team(NamedTuple):
    """An OpenMP runtime as compiled code sees it.

    Attributes:
        parallel: address of GOMP_parallel.
        thread_number: address of omp_get_thread_num.
    """

    parallel: int
    thread_number: int


class Pool(Protocol):
    """Threads that run the chunks of compiled tasks."""

    @property
    def threads(self) -> int:
        """How many threads compute, the calling one included."""
        ...

    def run(self, phases: npt.NDArray[np.int64]) -> None:
        """Run phases [n, 3] of (task, job, chunks); see `ThreadPool.run`."""
        ...

    @property
    def launcher(self) -> Launcher:
        """What compiled code starts the threads with; valid while the pool is."""
        ...

    @property
    def team(self) -> Team | None:
        """What one region for many phases is started with, see `team_kernel`; None: each phase is launched."""
        ...


class ThreadPool:
    """A number of threads, the caller's own included, that run the chunks of compiled tasks.

    Calls from several Python threads are served one after the other. A closed pool refuses further calls.

    Attributes:
        threads: how many threads compute, the calling one included.
        team: None.
    """

    team: None = None

    def __init__(self, threads: int | None = None, *, spin_us: float = DEFAULT_SPIN_US) -> None:
        """Create a pool; its workers start with the first call that needs them.

        Args:
            threads: from 1 to MAX_THREADS; None for `default_threads()`.
            spin_us: microseconds that a thread waits in a loop before it sleeps, from 0 to 10,000.

        Raises:
            ValueError: a number out of range.
        """
        if threads is None:
            threads = default_threads()
        if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)) or not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"threads={threads!r}: expected a whole number from 1 to {MAX_THREADS}")
        if not 0 <= spin_us <= 10_000:
            raise ValueError(f"spin_us={spin_us}: expected 0 to 10,000 microseconds")
        self.threads = int(threads)
        self._spin_us = float(spin_us)
        self._closed = False
        self._forget_workers()
        _pools.add(self)

    def _forget_workers(self) -> None:
        self._lock = threading.Lock()
        self._workers: list[threading.Thread] = []
        self._state: npt.NDArray[np.int64] | None = None
        self._address = 0
        self._launcher: Launcher | None = None

    def run(self, phases: npt.NDArray[np.int64]) -> None:
        """Run phases one after the other; all chunks of one are done before the next begins.

        Args:
            phases: int64 [n, 3], rows of (address of a task void(int64 job, int64 chunk), job, number of chunks).
                A task must not raise, nor call Python, nor use this pool.

        Raises:
            RuntimeError: the pool was closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("this ThreadPool was closed")
            if self._state is None:
                self._start()
            self._run_phases(self._address, self.threads - 1, phases)

    @property
    def launcher(self) -> Launcher:
        """What compiled code starts the threads with, for one phase at a time.

        Raises:
            RuntimeError: the pool was closed.
        """
        if self._launcher is None:
            with self._lock:
                if self._closed:
                    raise RuntimeError("this ThreadPool was closed")
                if self._state is None:
                    self._start()
                self._launcher = _launcher(self._address)
        return self._launcher

    def _start(self) -> None:
        from cpu_kernels import threads_kernel as kernel
        from cpu_kernels.compiling.compiler import prepare

        for entry in (kernel.run_phases, kernel.work_until_stopped, kernel.stop):
            prepare(entry)
        workers = self.threads - 1
        nbytes = 8 * (kernel.WORKERS + workers * kernel.WORKER_STRIDE)
        storage = np.zeros(nbytes + _STATE_ALIGNMENT_BYTES, np.uint8)
        start = -storage.ctypes.data % _STATE_ALIGNMENT_BYTES
        state = storage[start : start + nbytes].view(np.int64)
        state[kernel.SPINS] = round(self._spin_us / pause_us())
        address = state.ctypes.data
        kernel.initialise(address, workers)
        self._run_phases: Callable[[int, int, npt.NDArray[np.int64]], None] = kernel.run_phases
        self._workers = [
            threading.Thread(
                target=kernel.work_until_stopped, args=(address, worker), name=f"cpu-kernels-{worker}", daemon=True
            )
            for worker in range(workers)
        ]
        for thread in self._workers:
            thread.start()
        self._state, self._address = state, address

    def close(self) -> None:
        """Stop the workers and wait for them; later calls do nothing."""
        with self._lock:
            self._closed = True
            self._launcher = None
            if self._state is None:
                return
            from cpu_kernels import threads_kernel as kernel

            kernel.stop(self._address, self.threads - 1)
            for thread in self._workers:
                thread.join()
            self._workers, self._state = [], None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@cache
def shared_pool(threads: int | None = None) -> ThreadPool:
    """The process's pool of this many threads; None for `default_threads()` as it is at the first call."""
    return ThreadPool(threads)


def _launcher(state: int) -> Launcher:
    from cpu_kernels.launch import Launcher

    return Launcher(_launch_phase_address(), state)


@cache
def _launch_phase_address() -> int:
    from cpu_kernels import threads_kernel as kernel
    from cpu_kernels.launch import launcher_address

    return launcher_address(kernel.launch_phase)


@cache
def pause_us() -> float:
    """Microseconds of one turn of a waiting loop, the best of several short measurements."""
    from cpu_kernels import threads_kernel as kernel

    turns = 200
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter_ns()
        kernel.pause_times(turns)
        best = min(best, (time.perf_counter_ns() - start) / 1000)
    return max(best / turns, 1e-4)


def _forget_all_workers() -> None:
    for pool in list(_pools):
        pool._forget_workers()


def _close_all() -> None:
    for pool in list(_pools):
        pool.close()


# A forked child has the state of the workers but not the threads, and locks that nobody will release.
os.register_at_fork(after_in_child=_forget_all_workers)
atexit.register(_close_all)
