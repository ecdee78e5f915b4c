"""How functions are compiled: no GIL, C's arithmetic (a division by zero does not raise), and a cache on disk."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
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


def function_address(function: Any, arguments: int) -> int:
    """Address of a compiled function void(int64, ...) of so many arguments, for `call_at`; see `task_address`."""
    signature = types.void(*[types.int64] * arguments)
    compiled: Any = cfunc(signature, cache=True, error_model="numpy")(function)
    return int(compiled.address)


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
