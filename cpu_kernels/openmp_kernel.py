# mypy: allow-untyped-calls, allow-untyped-defs
"""The machine code under `OpenMpPool`: phases run by one team of the OpenMP runtime.

The team's data is a table of int64: address of GOMP_barrier, number of phases, then for each phase (task, job,
chunks, next chunk). Threads take chunks by raising the last; a barrier ends a phase.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from cpu_kernels.jit import carray, compiled_function, entry, inner, intrinsic
from cpu_kernels.simd import int64_pointer
from cpu_kernels.threads_kernel import call_task

BARRIER = 0
PHASES = 1
FIRST_PHASE = 2
PHASE_WORDS = 4

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_Codegen = Callable[[Any, Any, Any, Any], Any]


@intrinsic
def _atomic_increment(typingctx: Any, address: Any) -> tuple[Any, _Codegen]:
    """Add one; returns the old value."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(_I64, 1), "seq_cst")

    return types.int64(types.int64), codegen


@intrinsic
def _call_barrier(typingctx: Any, barrier: Any) -> tuple[Any, _Codegen]:
    """Call void() at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.call(builder.inttoptr(arguments[0], ir.FunctionType(ir.VoidType(), []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _call_parallel(typingctx: Any, parallel: Any, body: Any, data: Any, threads: Any) -> tuple[Any, _Codegen]:
    """Call void GOMP_parallel(void (*)(void *), void *, unsigned threads, unsigned flags) at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        parallel, body, data, threads = arguments
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64, _I32, _I32])
        function = builder.inttoptr(parallel, kind.as_pointer())
        builder.call(function, [body, data, builder.trunc(threads, _I32), ir.Constant(_I32, 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


def _team_body(data):
    head = carray(int64_pointer(data), (FIRST_PHASE,))
    barrier, phases = head[BARRIER], head[PHASES]
    for phase in range(phases):
        words = data + 8 * (FIRST_PHASE + PHASE_WORDS * phase)
        fields = carray(int64_pointer(words), (PHASE_WORDS,))
        chunks = fields[2]
        while True:
            chunk = _atomic_increment(words + 24)
            if chunk >= chunks:
                break
            call_task(fields[0], fields[1], chunk)
        if phase + 1 < phases:
            _call_barrier(barrier)


# What a launcher's state holds.
PARALLEL, BODY, MAX_THREADS, MOST_THREADS, STATE_WORDS = range(5)


@intrinsic
def call_for_number(typingctx: Any, function: Any) -> tuple[Any, _Codegen]:
    """Call int(void) at an address, as omp_get_max_threads is."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = builder.inttoptr(arguments[0], ir.FunctionType(_I32, []).as_pointer())
        return builder.sext(builder.call(function, []), _I64)

    return types.int64(types.int64), codegen


@inner
def run_region(parallel, body, data, threads):
    """Run the function void(int64) at address `body` on each thread of a team, with the address of an int64 array."""
    # Numba frees an array after its last use; as an argument it lives until this returns.
    _call_parallel(parallel, body, data.ctypes.data, threads)


def launch_team(state, task, job, chunks):
    """A launcher (see `launch.py`) for a team of the calling thread."""
    fields = carray(int64_pointer(state), (STATE_WORDS,))
    data = np.empty(FIRST_PHASE + PHASE_WORDS, np.int64)
    data[BARRIER] = 0
    data[PHASES] = 1
    data[FIRST_PHASE] = task
    data[FIRST_PHASE + 1] = job
    data[FIRST_PHASE + 2] = chunks
    data[FIRST_PHASE + 3] = 0
    threads = min(call_for_number(fields[MAX_THREADS]), fields[MOST_THREADS], chunks)
    run_region(fields[PARALLEL], fields[BODY], data, threads)


def body_address() -> int:
    """Address of the team's body void(int64 data)."""
    return compiled_function(_team_body, types.void, types.int64)


@entry("void(int64, int64, int64[::1], int64)")
def run_team(parallel: int, body: int, data: Any, threads: int) -> None:
    """Run the body with a team of so many threads, the caller's own included; returns when all are done."""
    run_region(parallel, body, data, threads)
