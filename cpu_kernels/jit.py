"""How this package's functions are compiled: without the GIL; see `compiling`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic as numba_intrinsic
from numba.np.numpy_support import carray as numba_carray

from cpu_kernels.compiling.compiler import KernelCompiler

# What these stand for in kernels differs from what they are in Python: no type would hold for both.
carray: Any = numba_carray
intrinsic: Any = numba_intrinsic


def c_function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the C library, for kernels to call; it must be loaded in every process."""
    return types.ExternalFunction(name, result(*arguments))


_compiler = KernelCompiler("cpu_kernels", "formats", nogil=True)

# Compiled into whatever calls it.
inner: Any = _compiler.inner()

entry = _compiler.entry
compiled_function = _compiler.address


def task_address(task: Any) -> int:
    """Address of a compiled task void(int64 job, int64 chunk) for `ThreadPool.run`; the caller keeps it per process.

    The constants that a task closes over are part of its key in the cache.
    """
    return compiled_function(task, types.void, types.int64, types.int64)


def function_address(function: Any, arguments: int) -> int:
    """Address of a compiled function void(int64, ...) of so many arguments, for `call_at`; see `task_address`."""
    return compiled_function(function, types.void, *[types.int64] * arguments)


def stack_room(builder: Any, nbytes: int, alignment_bytes: int) -> Any:
    """In an intrinsic: address of room on the stack of the calling function, not filled with anything.

    Numba's helper for this fills with zeros, which LLVM splits into bytes: minutes of compiling, and time at each call.
    """
    with builder.goto_entry_block():
        room = builder.alloca(ir.ArrayType(ir.IntType(8), nbytes))
    room.align = alignment_bytes
    return builder.ptrtoint(room, ir.IntType(64))


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


@intrinsic(prefer_literal=True)
def stack_words(typingctx: Any, count: Any) -> Any:
    """Address of a constant number of int64 on the stack of the calling function, not filled with anything.

    An array would take memory that Python counts, and threads without the GIL would have Python count it.
    """
    nbytes = 8 * count.literal_value

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return stack_room(builder, nbytes, 8)

    return types.int64(count), codegen
