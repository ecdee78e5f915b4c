"""How functions are compiled: no GIL, C's arithmetic (a division by zero does not raise), and a cache on disk.

The key in the cache has a digest of all sources, see `sources`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.extending import intrinsic as numba_intrinsic
from numba.np.numpy_support import carray as numba_carray

from cpu_kernels.sources import source_stamp

# What these stand for in kernels differs from what they are in Python: no type would hold for both.
carray: Any = numba_carray
intrinsic: Any = numba_intrinsic
_Cache: Any = FunctionCache


def c_function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the C library, for kernels to call; it must be loaded in every process."""
    return types.ExternalFunction(name, result(*arguments))


# Compiled into whatever calls it.
inner: Any = njit(error_model="numpy", nogil=True)

# Likewise; a product and its addition may be one instruction with one rounding.
inner_fused: Any = njit(error_model="numpy", nogil=True, fastmath={"contract"})


def entry(signature: str | None = None) -> Any:
    """Decorator of a function that Python calls; compiled at once where it has a signature, else at its first call."""

    def decorate(function: Any) -> Any:
        dispatcher: Any = njit(error_model="numpy", nogil=True)(function)
        dispatcher._cache = _StampedCache(function)
        if signature is not None:
            dispatcher.compile(signature)
            dispatcher.disable_compile()
        return dispatcher

    return decorate


def compiled_function(function: Any, result: Any, *arguments: Any) -> int:
    """Address of a C function, compiled or from the cache; the caller keeps it per process."""
    compiled: Any = CFunc(function, (arguments, result), {}, {"error_model": "numpy"})
    compiled._cache = _StampedCache(function)
    compiled.compile()
    return int(compiled.address)


class _StampedCache(_Cache):  # type: ignore[misc]
    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), source_stamp())


def task_address(task: Any) -> int:
    """Address of a compiled task void(int64 job, int64 chunk) for `ThreadPool.run`; the caller keeps it per process.

    The constants that a task closes over are part of its key in the cache.
    """
    return compiled_function(task, types.void, types.int64, types.int64)


def function_address(function: Any, arguments: int) -> int:
    """Address of a compiled function void(int64, ...) of so many arguments, for `call_at`; see `task_address`."""
    return compiled_function(function, types.void, *[types.int64] * arguments)


@intrinsic
def call_at(typingctx: Any, address: Any, arguments: Any) -> Any:
    """Call the function void(int64, ...) at an address with a tuple of arguments.

    What many kernels share, or what differs by format, is compiled once and called so.
    """

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        i64 = ir.IntType(64)
        function_type = ir.FunctionType(ir.VoidType(), [i64] * len(arguments))
        passed = [builder.extract_value(values[1], index) for index in range(len(arguments))]
        builder.call(builder.inttoptr(values[0], function_type.as_pointer()), passed)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen
