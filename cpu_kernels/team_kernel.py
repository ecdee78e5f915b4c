# mypy: allow-untyped-calls, allow-untyped-defs
"""One region of an OpenMP team for many phases: one thread goes on as it would alone and posts phases to the others.

A region of its own for each phase costs a microsecond or two at both ends, in which no memory is read. Here the others
wait in a loop, with the ticket of `threads_kernel`, and while they wait they ask for the weights that come next.
"""

from __future__ import annotations

from functools import cache

from numba import types

from cpu_kernels.atomics import atomic_exchange, atomic_load, pause
from cpu_kernels.jit import c_function, carray, inner
from cpu_kernels.launch import launcher_address
from cpu_kernels.simd import int64_pointer, prefetch_four_lines
from cpu_kernels.threads_kernel import PENDING, STOP, WORKERS, drain, has_chunks, post_phase

# Behind the state of `threads_kernel`, whose workers do not exist here: what will be read next, written by the one
# thread and read by the others.
AHEAD = WORKERS
AHEAD_NBYTES = AHEAD + 1
STATE_WORDS = AHEAD + 16
STATE_ALIGNMENT_BYTES = 128

# Turns of a waiting loop before the core is offered to others.
_PATIENCE = 2000
_LINES_NBYTES = 256

_sched_yield = c_function("sched_yield", types.int32)


@inner
def _wait_a_turn(turns):
    if turns < _PATIENCE:
        pause()
    else:
        _sched_yield()
    return turns + 1


def _launch_posted(state, task, job, chunks):
    """A launcher (see `launch.py`) for the region's one thread."""
    post_phase(state, task, job, chunks)
    drain(state)
    turns = 0
    while atomic_load(state + 8 * PENDING) != 0:
        turns = _wait_a_turn(turns)


@cache
def posting_launcher() -> int:
    """Address of the launcher for the region's one thread."""
    return launcher_address(_launch_posted)


@inner
def say_what_is_next(state, address, nbytes):
    """Weights that will be read after what runs now; waiting threads ask for them."""
    fields = carray(int64_pointer(state), (STATE_WORDS,))
    fields[AHEAD_NBYTES] = nbytes
    atomic_exchange(state + 8 * AHEAD, address)


@inner
def help_until_stopped(state, share, shares):
    """Run chunks of posted phases; while there are none, ask for a share of what is next."""
    fields = carray(int64_pointer(state), (STATE_WORDS,))
    known, at, end, turns = 0, 0, 0, 0
    while True:
        if has_chunks(state):
            drain(state)
            turns = 0
            continue
        if atomic_load(state + 8 * STOP) != 0:
            return
        ahead = atomic_load(state + 8 * AHEAD)
        if ahead != known:
            known = ahead
            part = fields[AHEAD_NBYTES] // shares // _LINES_NBYTES * _LINES_NBYTES
            at = ahead + share * part
            end = at + part
        if at < end:
            prefetch_four_lines(at)
            at += _LINES_NBYTES
        else:
            turns = _wait_a_turn(turns)


@inner
def stop(state):
    """Let the others leave `help_until_stopped`."""
    atomic_exchange(state + 8 * STOP, 1)
