# mypy: allow-untyped-calls, allow-untyped-defs
"""Memory that threads share, as compiled code sees it: atomic words, semaphores, and the hint of a waiting loop."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cpu_kernels.jit import c_function, inner, intrinsic

SEMAPHORE_WORDS = 4
"""int64 words that hold a semaphore of glibc."""

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_Codegen = Callable[[Any, Any, Any, Any], Any]

sem_init = c_function("sem_init", types.int32, types.int64, types.int32, types.uint32)
sem_post = c_function("sem_post", types.int32, types.int64)
sem_wait = c_function("sem_wait", types.int32, types.int64)
sem_trywait = c_function("sem_trywait", types.int32, types.int64)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I64.as_pointer())


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> tuple[Any, _Codegen]:
    """An int64, sequentially consistent."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(builder, arguments[0]), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_exchange(typingctx: Any, address: Any, value: Any) -> tuple[Any, _Codegen]:
    """Store the value; returns the old one."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("xchg", _pointer(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_add(typingctx: Any, address: Any, value: Any) -> tuple[Any, _Codegen]:
    """Add to an int64; returns the old value."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def compare_and_swap(typingctx: Any, address: Any, expected: Any, value: Any) -> tuple[Any, _Codegen]:
    """Store the value if the old one is as expected; returns whether it was."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, expected, value = arguments
        pair = builder.cmpxchg(_pointer(builder, address), expected, value, "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def load_u32(typingctx: Any, address: Any) -> tuple[Any, _Codegen]:
    """The uint32 at an address, acquired: reads that follow see what was written before it was."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I32.as_pointer())
        return builder.zext(builder.load_atomic(pointer, "acquire", 4), _I64)

    return types.int64(types.int64), codegen


@intrinsic
def store_u32(typingctx: Any, address: Any, value: Any) -> tuple[Any, _Codegen]:
    """Write a uint32, released: whoever reads it acquired sees what was written before."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I32.as_pointer())
        builder.store_atomic(builder.trunc(arguments[1], _I32), pointer, "release", 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> tuple[Any, _Codegen]:
    """Tell the core that this is a waiting loop."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        machine = platform.machine()
        if machine in ("x86_64", "AMD64"):
            function_type = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function_type, "llvm.x86.sse2.pause"), [])
        elif machine in ("aarch64", "arm64"):
            function_type = ir.FunctionType(ir.VoidType(), [_I32])
            hint = cgutils.get_or_insert_function(builder.module, function_type, "llvm.aarch64.hint")
            builder.call(hint, [ir.Constant(_I32, 1)])
        return context.get_dummy_value()

    return types.void(), codegen


@inner
def wait_semaphore(semaphore):
    """Take one post, or sleep until there is one."""
    # A signal handler ends the wait without a post.
    while sem_wait(semaphore) != 0:
        pass


@inner
def wake(asleep, semaphore):
    """Wake a thread that raised its flag before it went to sleep; whoever takes the flag down owns the wake-up."""
    if atomic_load(asleep) != 0 and atomic_exchange(asleep, 0) != 0:
        sem_post(semaphore)
