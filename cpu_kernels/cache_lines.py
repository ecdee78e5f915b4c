# mypy: allow-untyped-calls
"""Asking for memory ahead, as LLVM code."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

_I8, _I32 = ir.IntType(8), ir.IntType(32)


def prefetch(builder: Any, address: Any) -> None:
    """Ask for the cache line at an address for reading, into the second level; it need not exist.

    A core waits for more lines at a time there than on their way to the first.
    """
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for_reading, into_second_level, of_data = (ir.Constant(_I32, value) for value in (0, 2, 1))
    pointer = builder.inttoptr(address, _I8.as_pointer())
    builder.call(function, [pointer, for_reading, into_second_level, of_data])
