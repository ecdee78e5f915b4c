"""Kernels on the threads of the OpenMP runtime that the process has anyway.

torch's CPU operators run on a team of OpenMP threads that wait in a loop for milliseconds after each region. Workers of
another pool would have to take their cores back from them by the scheduler's time slices, several times a layer;
the same team takes the next region in about a microsecond. So where torch's runtime is known, kernels join it.

The number of threads is the runtime's: `torch.set_num_threads` holds for kernels too. The runtime does not survive a
fork: a child must use a `ThreadPool`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cpu_kernels.threads import Team


class OpenMpPool:
    """Runs the chunks of compiled tasks on an OpenMP team; has the interface of `ThreadPool`.

    Each calling thread has a team of its own, as in OpenMP.
    """

    def __init__(self, library: Path, most_threads: int) -> None:
        """Join a runtime.

        Args:
            library: a GNU OpenMP runtime that is loaded already.
            most_threads: bound on the threads of a region.

        Raises:
            OSError: it cannot be opened.
            AttributeError: it is not a GNU OpenMP runtime.
        """
        from cpu_kernels import openmp_kernel as kernel
        from cpu_kernels.compiling.compiler import prepare
        from cpu_kernels.launch import Launcher, launcher_address

        loaded = ctypes.CDLL(str(library))
        self._max_threads = loaded.omp_get_max_threads
        self._most_threads = most_threads
        self._parallel = _address(loaded, "GOMP_parallel")
        self._barrier = _address(loaded, "GOMP_barrier")
        self._body = kernel.body_address()
        prepare(kernel.run_team)
        self._run_team = kernel.run_team
        self._kernel = kernel
        self._state = np.zeros(kernel.STATE_WORDS, np.int64)
        self._state[kernel.PARALLEL] = self._parallel
        self._state[kernel.BODY] = self._body
        self._state[kernel.MAX_THREADS] = _address(loaded, "omp_get_max_threads")
        self._state[kernel.MOST_THREADS] = most_threads
        self.launcher = Launcher(launcher_address(kernel.launch_team), self._state.ctypes.data)
        self._team = Team(self._parallel, _address(loaded, "omp_get_thread_num"))

    @property
    def threads(self) -> int:
        """How many threads the calling thread's next region has."""
        return min(int(self._max_threads()), self._most_threads)

    @property
    def team(self) -> Team | None:
        """What one region for a whole tape is started with; None for a single thread."""
        return self._team if self.threads > 1 else None

    def run(self, phases: npt.NDArray[np.int64]) -> None:
        """Run phases one after the other; all chunks of one are done before the next begins.

        Args:
            phases: int64 [n, 3], rows of (address of a task void(int64 job, int64 chunk), job, number of chunks).
                A task must not raise, nor call Python, nor use a pool.
        """
        kernel = self._kernel
        data = np.zeros(kernel.FIRST_PHASE + kernel.PHASE_WORDS * len(phases), dtype=np.int64)
        data[kernel.BARRIER] = self._barrier
        data[kernel.PHASES] = len(phases)
        data[kernel.FIRST_PHASE :].reshape(-1, kernel.PHASE_WORDS)[:, :3] = phases
        self._run_team(self._parallel, self._body, data, min(self.threads, int(phases[:, 2].max(initial=1))))


def _address(library: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    assert address is not None
    return address


@cache
def openmp_pool(library: Path, most_threads: int) -> OpenMpPool:
    """The process's pool on a runtime, with so many threads at most."""
    return OpenMpPool(library, most_threads)
