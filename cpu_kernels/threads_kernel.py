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

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from cpu_kernels.atomics import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    compare_and_swap,
    pause,
    sem_init,
    sem_post,
    sem_trywait,
    wait_semaphore,
    wake,
)
from cpu_kernels.jit import carray, entry, inner, intrinsic
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

_I64 = ir.IntType(64)
_Codegen = Callable[[Any, Any, Any, Any], Any]


@intrinsic
def call_task(typingctx: Any, task: Any, job: Any, chunk: Any) -> tuple[Any, _Codegen]:
    """Call the function void(int64 job, int64 chunk) at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function_type = ir.FunctionType(ir.VoidType(), [_I64, _I64])
        builder.call(builder.inttoptr(arguments[0], function_type.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@inner
def drain(state):
    """Claim and run chunks until none is left; True if the last chunk of the phase to finish was one of them."""
    fields = carray(int64_pointer(state), (WORKERS,))
    last = False
    while True:
        ticket = atomic_load(state + 8 * TICKET)
        left = ticket & _CHUNK_MASK
        if left == 0:
            return last
        if compare_and_swap(state + 8 * TICKET, ticket, ticket - 1):
            call_task(fields[TASK], fields[JOB], fields[CHUNKS] - left)
            last = atomic_add(state + 8 * PENDING, -1) == 1


@inner
def post_phase(state, task, job, chunks):
    """Let threads claim the chunks of a phase; no other phase may be running."""
    fields = carray(int64_pointer(state), (WORKERS,))
    fields[TASK] = task
    fields[JOB] = job
    fields[CHUNKS] = chunks
    atomic_exchange(state + 8 * PENDING, chunks)
    epoch = (atomic_load(state + 8 * TICKET) >> 32) + 1
    atomic_exchange(state + 8 * TICKET, ((epoch & 0x7FFFFFFF) << 32) | chunks)


@inner
def _run_phase(state, workers, task, job, chunks):
    if workers == 0 or chunks <= 1:
        for chunk in range(chunks):
            call_task(task, job, chunk)
        return
    fields = carray(int64_pointer(state), (WORKERS,))
    post_phase(state, task, job, chunks)
    for worker in range(min(workers, chunks - 1)):
        _ring(state + 8 * (WORKERS + worker * WORKER_STRIDE))
    if not drain(state):
        for _ in range(fields[SPINS]):
            if sem_trywait(state + 8 * FINISHED) == 0:
                return
            pause()
        wait_semaphore(state + 8 * FINISHED)


@inner
def _ring(worker):
    wake(worker + 8 * ASLEEP, worker + 8 * DOORBELL)


@inner
def has_chunks(state):
    """Whether chunks of a phase are left to be claimed."""
    return (atomic_load(state + 8 * TICKET) & _CHUNK_MASK) != 0


@inner
def _has_news(state):
    return has_chunks(state) or atomic_load(state + 8 * STOP) != 0


@entry("void(int64, int64)")
def initialise(state: int, workers: int) -> None:
    """Make the semaphores of a zeroed state."""
    sem_init(state + 8 * FINISHED, 0, 0)
    sem_init(state + 8 * CALLER, 0, 1)
    carray(int64_pointer(state), (WORKERS,))[WORKER_COUNT] = workers
    for worker in range(workers):
        sem_init(state + 8 * (WORKERS + worker * WORKER_STRIDE + DOORBELL), 0, 0)


@entry("void(int64, int64, int64[:, ::1])")
def run_phases(state: int, workers: int, phases: Any) -> None:
    """Run phases [n, 3] of (task address, job address, chunks), each to its end before the next."""
    wait_semaphore(state + 8 * CALLER)
    for phase in range(phases.shape[0]):
        _run_phase(state, workers, phases[phase, 0], phases[phase, 1], phases[phase, 2])
    sem_post(state + 8 * CALLER)


def launch_phase(state, task, job, chunks):
    """A launcher (see `launch.py`) for the workers of a state."""
    wait_semaphore(state + 8 * CALLER)
    _run_phase(state, carray(int64_pointer(state), (WORKERS,))[WORKER_COUNT], task, job, chunks)
    sem_post(state + 8 * CALLER)


@entry("void(int64, int64)")
def work_until_stopped(state: int, worker: int) -> None:
    """Body of worker thread `worker`: run chunks, spin a while for more, sleep; returns after `stop`."""
    fields = carray(int64_pointer(state), (WORKERS,))
    own = state + 8 * (WORKERS + worker * WORKER_STRIDE)
    while True:
        for _ in range(fields[SPINS]):
            if _has_news(state):
                break
            pause()
        if not _has_news(state):
            atomic_exchange(own + 8 * ASLEEP, 1)
            # News that came before the flag was up rang nobody.
            if not _has_news(state) or atomic_exchange(own + 8 * ASLEEP, 0) == 0:
                wait_semaphore(own + 8 * DOORBELL)
        if atomic_load(state + 8 * STOP) != 0:
            return
        if drain(state):
            sem_post(state + 8 * FINISHED)


@entry("void(int64, int64)")
def stop(state: int, workers: int) -> None:
    """Let all workers return, once no phase is running."""
    wait_semaphore(state + 8 * CALLER)
    atomic_exchange(state + 8 * STOP, 1)
    for worker in range(workers):
        _ring(state + 8 * (WORKERS + worker * WORKER_STRIDE))


@entry("void(int64)")
def pause_times(count: int) -> None:
    """One turn of the workers' waiting loop, `count` times, on a state of its own; for calibration."""
    for _ in range(count):
        pause()
