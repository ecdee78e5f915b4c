# mypy: allow-untyped-defs
"""The machine that plays a tape: kernels one after the other, in one call from Python.

A tape is int64 [n, WORDS]: the first word of a row says which kernel, the others are its arguments: addresses, sizes,
and floats as their bits. See `tape.py`, which writes tapes.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from cpu_kernels import packed_jobs
from cpu_kernels.decode_attention_kernel import run_decode_attention
from cpu_kernels.jit import carray, entry, inner, task_address
from cpu_kernels.linear_kernel import run_linear
from cpu_kernels.rms_norm_kernel import run_rms_norm
from cpu_kernels.rotary_kernel import run_rotary
from cpu_kernels.simd import (
    Elements,
    element_pointer,
    element_to_float32,
    float32_from_bits,
    float32_to_element,
    int64_pointer,
)
from cpu_kernels.tape_experts_kernel import choose, run_experts, run_packed_experts
from cpu_kernels.team_kernel import say_what_is_next
from cpu_kernels.threads_kernel import call_task
from cpu_kernels.weighted_sum_kernel import run_weighted_sum

WORDS = 28
# The last words of every row: the weights that rows after it read next; 0 where none are known.
AHEAD, AHEAD_NBYTES = WORDS - 2, WORDS - 1

(
    RMS_NORM,
    LINEAR,
    PACKED_LINEAR,
    ROTARY,
    STORE_ROWS,
    ATTENTION,
    RUN_TASK,  # a task whose job is the row from its third word on
    CHOOSE,
    RUN_EXPERTS,
    PACKED_EXPERTS,
    WEIGHTED_SUM,
) = range(11)

# Fields of a job of addition.
_A, _B, _SUM, _COUNT, _ADD_FIELDS = range(5)


@inner
def _store_rows(source, target, rows, row_bytes, target_stride):
    """Rows that lie one after the other, each to its place; bytes are a multiple of 2."""
    for row in range(rows):
        data = carray(int64_pointer(source + row * row_bytes), (row_bytes // 8,))
        out = carray(int64_pointer(target + row * target_stride), (row_bytes // 8,))
        for i in range(row_bytes // 8):
            out[i] = data[i]


@inner
def _add(elements, job_address):
    job = carray(int64_pointer(job_address), (_ADD_FIELDS,))
    count = job[_COUNT]
    a = carray(element_pointer(elements, job[_A]), (count,))
    b = carray(element_pointer(elements, job[_B]), (count,))
    out = carray(element_pointer(elements, job[_SUM]), (count,))
    for i in range(count):
        out[i] = float32_to_element(elements, element_to_float32(elements, a[i]) + element_to_float32(elements, b[i]))


@cache
def add_task(elements: Elements) -> int:
    """Address of the compiled task that adds and rounds, void(int64 job, int64 unused)."""

    def task(job: int, chunk: int) -> None:
        _add(elements, job)

    return task_address(task)


@inner
def _float(bits):
    return float32_from_bits(np.int32(bits))


@inner
def _run_packed_linear(launcher, state, threads, row):
    tasks = carray(int64_pointer(row[1]), (2,))
    scratch = carray(int64_pointer(row[16]), (row[17],))
    packed_jobs.run_linear(
        launcher, state, threads, tasks, row[2], row[3], row[4], row[5], row[6], row[7], row[8], row[9], row[10],
        row[11], row[12], row[13], row[14], row[15], scratch,
    )  # fmt: skip


@entry("int64(int64, int64, int64, int64, int64[:, ::1], int64, int64)")
def run_tape(launcher, state, threads, team, tape, first, end):
    """Run the rows of a tape from `first` to before `end`, in order.

    launcher, state, threads: of the pool. team: state of a `team_kernel` region that is told what is next; 0: none.
    tape: int64 [n, WORDS].

    Returns:
        `end`, or the row behind a choice of experts that is not clear; a choice is never the last row.
    """
    for index in range(first, end):
        row = tape[index]
        kind = row[0]
        if team:
            say_what_is_next(team, row[AHEAD], row[AHEAD_NBYTES])
        if kind == RMS_NORM:
            run_rms_norm(
                launcher, state, row[1], row[2], row[3], row[4], row[5], row[6], row[7], row[8], _float(row[9])
            )  # fmt: skip
        elif kind == LINEAR:
            run_linear(
                launcher, state, row[1], row[2], row[3], row[4], row[5], row[6], row[7], row[8], row[9]
            )  # fmt: skip
        elif kind == PACKED_LINEAR:
            _run_packed_linear(launcher, state, threads, row)
        elif kind == ROTARY:
            run_rotary(
                launcher, state, row[1], row[2], row[3], row[4], row[5], row[6], row[7], row[8], row[9], row[10],
                row[11], row[12], row[13], row[14], row[15], row[16], row[17], row[18], row[19], row[20], row[21],
                row[22], row[23],
            )  # fmt: skip
        elif kind == STORE_ROWS:
            _store_rows(row[1], row[2], row[3], row[4], row[5])
        elif kind == ATTENTION:
            run_decode_attention(
                launcher, state, threads, row[1], row[2], row[3], row[4], row[5], row[6], row[7], row[8], row[9],
                row[10], row[11], row[12], row[13], row[14], row[15], row[16], row[17], row[18], row[19], row[20], 0,
                _float(row[21]),
            )  # fmt: skip
        elif kind == RUN_TASK:
            call_task(row[1], row.ctypes.data + 16, 0)
        elif kind == CHOOSE:
            if not choose(row):
                return index + 1
        elif kind == RUN_EXPERTS:
            run_experts(launcher, state, threads, row)
        elif kind == PACKED_EXPERTS:
            run_packed_experts(launcher, state, threads, row)
        elif kind == WEIGHTED_SUM:
            run_weighted_sum(launcher, state, row[1], row[2], row[3], row[4], row[5], row[6], row[7])
    return end
