# mypy: allow-untyped-defs
"""A tape that is played in one region of an OpenMP team; see `team_kernel`."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import types

from cpu_kernels.jit import carray, compiled_function, entry
from cpu_kernels.openmp_kernel import call_for_number, run_region
from cpu_kernels.simd import int64_pointer
from cpu_kernels.tape_kernel import WORDS, run_tape
from cpu_kernels.team_kernel import (
    STATE_ALIGNMENT_BYTES,
    STATE_WORDS,
    help_until_stopped,
    stop,
)

# What the threads of a region are given.
STATE, THREAD_NUMBER, LAUNCHER, THREADS, TAPE, ROWS, FIRST, END, ENDED, FIELDS = range(10)


def _play(data):
    fields = carray(int64_pointer(data), (FIELDS,))
    state, threads = fields[STATE], fields[THREADS]
    thread = call_for_number(fields[THREAD_NUMBER])
    if thread > 0:
        help_until_stopped(state, thread - 1, threads - 1)
        return
    tape = carray(int64_pointer(fields[TAPE]), (fields[ROWS], WORDS))
    fields[ENDED] = run_tape(fields[LAUNCHER], state, threads, state, tape, fields[FIRST], fields[END])
    stop(state)


@cache
def body_address() -> int:
    """Address of what each thread of the region runs, void(int64 data)."""
    return compiled_function(_play, types.void, types.int64)


@entry("int64(int64, int64, int64, int64, int64, int64[:, ::1], int64, int64)")
def play_in_team(parallel, body, thread_number, launcher, threads, tape, first, end):
    """As `run_tape`, with at least two threads.

    parallel, thread_number: addresses of GOMP_parallel and omp_get_thread_num. body: see `body_address`. launcher: see
    `posting_launcher`.
    """
    room = np.zeros(STATE_WORDS + STATE_ALIGNMENT_BYTES // 8, np.int64)
    data = np.zeros(FIELDS, np.int64)
    data[STATE] = (room.ctypes.data + STATE_ALIGNMENT_BYTES - 1) // STATE_ALIGNMENT_BYTES * STATE_ALIGNMENT_BYTES
    data[THREAD_NUMBER], data[LAUNCHER], data[THREADS] = thread_number, launcher, threads
    data[TAPE], data[ROWS], data[FIRST], data[END] = tape.ctypes.data, len(tape), first, end
    run_region(parallel, body, data, threads)
    # `room` is read by address only, and must live until here.
    return data[ENDED] + 0 * room[0]
