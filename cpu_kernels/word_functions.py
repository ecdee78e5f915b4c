# mypy: allow-untyped-defs
"""Functions that a GPU's driver calls on a thread of its own: write a word of memory, or wait for one.

What stream memory operations do, for drivers without them (under WSL2 some lack them). A driver calls them between
what a stream does before and after, and calls nothing else of that stream meanwhile.
"""

from __future__ import annotations

from functools import cache

from numba import types

from cpu_kernels.atomics import load_u32, pause, store_u32
from cpu_kernels.jit import carray, compiled_function
from cpu_kernels.simd import int64_pointer

ADDRESS, VALUE, ARGUMENTS = range(3)
"""What they are called with: the address of int64 [ARGUMENTS]."""


def _write(arguments):
    given = carray(int64_pointer(arguments), (ARGUMENTS,))
    store_u32(given[ADDRESS], given[VALUE])


def _wait(arguments):
    given = carray(int64_pointer(arguments), (ARGUMENTS,))
    while load_u32(given[ADDRESS]) != given[VALUE]:
        pause()


@cache
def write_function() -> int:
    """Address of a C function void(void *arguments) that stores VALUE, released, at ADDRESS."""
    return compiled_function(_write, types.void, types.int64)


@cache
def wait_function() -> int:
    """Address of a C function void(void *arguments) that returns when ADDRESS has VALUE, acquired."""
    return compiled_function(_wait, types.void, types.int64)
