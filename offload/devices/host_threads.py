"""Which threads the CPU kernels run on."""

from __future__ import annotations

import os
import warnings
from functools import cache
from pathlib import Path

import torch

from cpu_kernels.openmp import openmp_pool
from cpu_kernels.openmp_waits import ShortWaits
from cpu_kernels.threads import THREADS_VARIABLE, Pool, default_threads, shared_pool


class SlowThreadsWarning(UserWarning):
    """Kernels have threads of their own beside torch's."""


def kernel_pool() -> Pool:
    """The team of torch's own OpenMP runtime, so that the two do not take cores from each other.

    The number of threads is torch's (`torch.set_num_threads`, OMP_NUM_THREADS), at most what OFFLOAD_CPU_THREADS says
    where it is set. Where torch has no GNU OpenMP runtime, a pool of the kernels' own, with a warning. In a forked
    child too: there a team of the parent's runtime would wait for threads that the child does not have.
    """
    return shared_pool(None) if _forked else _torchs_team()


def short_waits() -> ShortWaits | None:
    """Threads of torch's team give their cores up between regions until it is closed, or as long as its owner lives.

    None where there is nothing to gain: the team leaves cores free, or there is no GNU OpenMP runtime.
    """
    libraries, threads = _loaded_runtimes(), torch.get_num_threads()
    if _forked or not libraries or not 1 < threads >= len(os.sched_getaffinity(0)):
        return None
    try:
        return ShortWaits(libraries[0], threads)
    except (OSError, AttributeError):
        return None


@cache
def _torchs_team() -> Pool:
    for library in _loaded_runtimes():
        try:
            return openmp_pool(library, default_threads())
        except (OSError, AttributeError):
            continue
    warnings.warn(
        "torch's OpenMP runtime was not found: CPU kernels use threads of their own, which compete with torch's for "
        f"the cores; {THREADS_VARIABLE} and OMP_NUM_THREADS divide them",
        SlowThreadsWarning,
        stacklevel=2,
    )
    return shared_pool(None)


def _loaded_runtimes() -> list[Path]:
    """GNU OpenMP libraries that are mapped into this process, torch's own first."""
    mapped = {Path(line.split(maxsplit=5)[5].rstrip()) for line in _maps() if "libgomp" in line}
    own = Path(torch.__file__).parent
    return sorted(mapped, key=lambda path: (own not in path.parents, str(path)))


_forked = False


def _note_fork() -> None:
    """GNU OpenMP hangs in the first parallel region of a forked child; with one thread torch has none.

    PyTorch does the same in the workers that it forks itself.
    """
    global _forked
    _forked = True
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_note_fork)


def _maps() -> list[str]:
    try:
        return Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
