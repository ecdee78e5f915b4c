# mypy: allow-untyped-calls, allow-untyped-defs
"""The machine code under `ThreadPool`: a doorbell, a ticket that hands out chunks, and the sleep of idle threads.

State is one table of int64. The ticket holds (epoch << 32 | chunks left): a chunk is claimed by lowering it with
compare-and-swap, so a thread that wakes late claims a chunk of the phase that runs now or none. What describes the
phase is written before the ticket and stays until every claimed chunk is done, so a claim makes it safe to read.
Nobody waits for a thread that claimed nothing.

A thread about to sleep raises its flag, looks at the ticket again, and waits on its semaphore. Whoever takes the
flag down, the sleeper itself or the one who rings, owns the wake-up: no ring is lost and none is left over.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cpu_kernels.jit import c_function, carray, entry, inner, intrinsic
from cpu_kernels.simd import int64_pointer

# Indices into the state. What different threads write lies 128 bytes apart.
TICKET = 0
PENDING = 16  # chunks not yet finished
TASK = 32
JOB = 33
CHUNKS = 34
STOP = 48
SPINS = 49  # turns of a waiting loop before a thread sleeps
FINISHED = 64  # semaphore: posted when the last chunk was finished by another thread than the caller
CALLER = 72  # semaphore: held by the one caller whose phases run
WORKER_COUNT = 76
WORKERS = 80
WORKER_STRIDE = 32
ASLEEP = 0
DOORBELL = 16  # semaphore

_CHUNK_MASK = 0xFFFFFFFF

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_Codegen = Callable[[Any, Any, Any, Any], Any]

_sem_init = c_function("sem_init", types.int32, types.int64, types.int32, types.uint32)
_sem_post = c_function("sem_post", types.int32, types.int64)
_sem_wait = c_function("sem_wait", types.int32, types.int64)
_sem_trywait = c_function("sem_trywait", types.int32, types.int64)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I64.as_pointer())


@intrinsic
def _atomic_load(typingctx: Any, address: Any) -> tuple[Any, _Codegen]:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(builder, arguments[0]), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _atomic_exchange(typingctx: Any, address: Any, value: Any) -> tuple[Any, _Codegen]:
    """Store the value; returns the old one."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("xchg", _pointer(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _atomic_decrement(typingctx: Any, address: Any) -> tuple[Any, _Codegen]:
    """Subtract one; returns the old value."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("sub", _pointer(builder, arguments[0]), ir.Constant(_I64, 1), "seq_cst")

    return types.int64(types.int64), codegen


@intrinsic
def _compare_and_swap(typingctx: Any, address: Any, expected: Any, value: Any) -> tuple[Any, _Codegen]:
    """Store the value if the old one is as expected; returns whether it was."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, expected, value = arguments
        pair = builder.cmpxchg(_pointer(builder, address), expected, value, "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def _pause(typingctx: Any) -> tuple[Any, _Codegen]:
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


@intrinsic
def call_task(typingctx: Any, task: Any, job: Any, chunk: Any) -> tuple[Any, _Codegen]:
    """Call the function void(int64 job, int64 chunk) at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function_type = ir.FunctionType(ir.VoidType(), [_I64, _I64])
        builder.call(builder.inttoptr(arguments[0], function_type.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@inner
def _wait(semaphore):
    # A signal handler ends the wait without a post.
    while _sem_wait(semaphore) != 0:
        pass


@inner
def _drain(state):
    """Claim and run chunks until none is left; True if the last chunk of the phase to finish was one of them."""
    fields = carray(int64_pointer(state), (WORKERS,))
    last = False
    while True:
        ticket = _atomic_load(state + 8 * TICKET)
        left = ticket & _CHUNK_MASK
        if left == 0:
            return last
        if _compare_and_swap(state + 8 * TICKET, ticket, ticket - 1):
            call_task(fields[TASK], fields[JOB], fields[CHUNKS] - left)
            last = _atomic_decrement(state + 8 * PENDING) == 1


@inner
def _run_phase(state, workers, task, job, chunks):
    if workers == 0 or chunks <= 1:
        for chunk in range(chunks):
            call_task(task, job, chunk)
        return
    fields = carray(int64_pointer(state), (WORKERS,))
    fields[TASK] = task
    fields[JOB] = job
    fields[CHUNKS] = chunks
    _atomic_exchange(state + 8 * PENDING, chunks)
    epoch = (_atomic_load(state + 8 * TICKET) >> 32) + 1
    _atomic_exchange(state + 8 * TICKET, ((epoch & 0x7FFFFFFF) << 32) | chunks)
    for worker in range(min(workers, chunks - 1)):
        _ring(state + 8 * (WORKERS + worker * WORKER_STRIDE))
    if not _drain(state):
        for _ in range(fields[SPINS]):
            if _sem_trywait(state + 8 * FINISHED) == 0:
                return
            _pause()
        _wait(state + 8 * FINISHED)


@inner
def _ring(worker):
    if _atomic_load(worker + 8 * ASLEEP) != 0 and _atomic_exchange(worker + 8 * ASLEEP, 0) != 0:
        _sem_post(worker + 8 * DOORBELL)


@inner
def _has_news(state):
    return (_atomic_load(state + 8 * TICKET) & _CHUNK_MASK) != 0 or _atomic_load(state + 8 * STOP) != 0


@entry("void(int64, int64)")
def initialise(state: int, workers: int) -> None:
    """Make the semaphores of a zeroed state."""
    _sem_init(state + 8 * FINISHED, 0, 0)
    _sem_init(state + 8 * CALLER, 0, 1)
    carray(int64_pointer(state), (WORKERS,))[WORKER_COUNT] = workers
    for worker in range(workers):
        _sem_init(state + 8 * (WORKERS + worker * WORKER_STRIDE + DOORBELL), 0, 0)


@entry("void(int64, int64, int64[:, ::1])")
def run_phases(state: int, workers: int, phases: Any) -> None:
    """Run phases [n, 3] of (task address, job address, chunks), each to its end before the next."""
    _wait(state + 8 * CALLER)
    for phase in range(phases.shape[0]):
        _run_phase(state, workers, phases[phase, 0], phases[phase, 1], phases[phase, 2])
    _sem_post(state + 8 * CALLER)


def launch_phase(state, task, job, chunks):
    """A launcher (see `launch.py`) for the workers of a state."""
    _wait(state + 8 * CALLER)
    _run_phase(state, carray(int64_pointer(state), (WORKERS,))[WORKER_COUNT], task, job, chunks)
    _sem_post(state + 8 * CALLER)


@entry("void(int64, int64)")
def work_until_stopped(state: int, worker: int) -> None:
    """Body of worker thread `worker`: run chunks, spin a while for more, sleep; returns after `stop`."""
    fields = carray(int64_pointer(state), (WORKERS,))
    own = state + 8 * (WORKERS + worker * WORKER_STRIDE)
    while True:
        for _ in range(fields[SPINS]):
            if _has_news(state):
                break
            _pause()
        if not _has_news(state):
            _atomic_exchange(own + 8 * ASLEEP, 1)
            # News that came before the flag was up rang nobody.
            if not _has_news(state) or _atomic_exchange(own + 8 * ASLEEP, 0) == 0:
                _wait(own + 8 * DOORBELL)
        if _atomic_load(state + 8 * STOP) != 0:
            return
        if _drain(state):
            _sem_post(state + 8 * FINISHED)


@entry("void(int64, int64)")
def stop(state: int, workers: int) -> None:
    """Let all workers return, once no phase is running."""
    _wait(state + 8 * CALLER)
    _atomic_exchange(state + 8 * STOP, 1)
    for worker in range(workers):
        _ring(state + 8 * (WORKERS + worker * WORKER_STRIDE))


@entry("void(int64)")
def pause_times(count: int) -> None:
    """One turn of the workers' waiting loop, `count` times, on a state of its own; for calibration."""
    for _ in range(count):
        _pause()
