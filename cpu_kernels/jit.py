"""How functions are compiled: no GIL, C's arithmetic (a division by zero does not raise), and a cache on disk."""

from __future__ import annotations

from typing import Any

from numba import cfunc, njit, types
from numba.extending import intrinsic as numba_intrinsic
from numba.np.numpy_support import carray as numba_carray

# What these stand for in kernels differs from what they are in Python: no type would hold for both.
carray: Any = numba_carray
intrinsic: Any = numba_intrinsic


def c_function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the C library, for kernels to call; it must be loaded in every process."""
    return types.ExternalFunction(name, result(*arguments))


# Compiled into whatever calls it.
inner: Any = njit(error_model="numpy", nogil=True)

# Likewise; a product and its addition may be one instruction with one rounding.
inner_fused: Any = njit(error_model="numpy", nogil=True, fastmath={"contract"})


def entry(signature: str | None = None) -> Any:
    """Decorator of a function that Python calls; compiled at once where it has a signature, else at its first call."""
    return njit(signature, cache=True, error_model="numpy", nogil=True)


def task_address(task: Any) -> int:
    """Address of a compiled task void(int64 job, int64 chunk) for `ThreadPool.run`; the caller keeps it per process.

    The constants that a task closes over are part of its key in the cache.
    """
    compiled: Any = cfunc(types.void(types.int64, types.int64), cache=True, error_model="numpy")(task)
    return int(compiled.address)
