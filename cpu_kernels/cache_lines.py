# mypy: allow-untyped-defs, allow-untyped-calls
"""Asking for memory ahead."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from cpu_kernels.jit import inner, intrinsic

LINE_NBYTES = 64

_I8, _I32 = ir.IntType(8), ir.IntType(32)


def prefetch(builder: Any, address: Any) -> None:
    """As LLVM code: ask for the cache line at an address for reading, into the second level; it need not exist.

    A core waits for more lines at a time there than on their way to the first.
    """
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for_reading, into_second_level, of_data = (ir.Constant(_I32, value) for value in (0, 2, 1))
    pointer = builder.inttoptr(address, _I8.as_pointer())
    builder.call(function, [pointer, for_reading, into_second_level, of_data])


@intrinsic
def ask_for_line(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address; it need not exist."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@inner
def ask_for(first, end):
    """Ask for what lies between two addresses, the first of them that of a line."""
    for address in range(first, end, LINE_NBYTES):
        ask_for_line(address)
