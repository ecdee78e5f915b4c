"""Which threads the CPU kernels run on."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch

from cpu_kernels.openmp import openmp_pool
from cpu_kernels.threads import THREADS_VARIABLE, Pool, default_threads, shared_pool


class SlowThreadsWarning(UserWarning):
    """Kernels have threads of their own beside torch's."""


@cache
def kernel_pool() -> Pool:
    """The team of torch's own OpenMP runtime, so that the two do not take cores from each other.

    The number of threads is torch's (`torch.set_num_threads`, OMP_NUM_THREADS), at most what OFFLOAD_CPU_THREADS says
    where it is set. Where torch has no GNU OpenMP runtime, a pool of the kernels' own, with a warning.
    """
    # torch starts its runtime with its first parallel region; until then the library is only mapped.
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


def _maps() -> list[str]:
    try:
        return Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
