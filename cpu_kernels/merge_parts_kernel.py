# mypy: allow-untyped-defs
"""Kernel of `merge_parts`, whose chunks are runs of rows: a row is one query of one head."""

from __future__ import annotations

from functools import cache

import numpy as np

from cpu_kernels.activation_kernel import exp_float32
from cpu_kernels.jit import carray, entry, inner, task_address
from cpu_kernels.launch import launch
from cpu_kernels.simd import float32_pointer, int64_pointer

# Rows are [B, rows of a sequence]; how far parts of one and of the next sequence are apart, in rows, is told.
(
    OUTS, LSES, SINKS, RESULT, COUNT, SEQUENCE_ROWS, ROWS, ROWS_OF_HEAD, COLUMNS, ROWS_PER_CHUNK, SEQUENCE_STEP,
    PART_STEP, JOB_FIELDS,
) = range(13)  # fmt: skip

_ONE_THREAD_ELEMENTS = 1 << 16
_MINUS_INFINITY = np.float32(-np.inf)
_ZERO = np.float32(0)


@inner
def _merge_row(job, row):
    sequence, place = row // job[SEQUENCE_ROWS], row % job[SEQUENCE_ROWS]
    count, columns, step = job[COUNT], job[COLUMNS], job[PART_STEP]
    first = sequence * job[SEQUENCE_STEP] + place
    lses = carray(float32_pointer(job[LSES]), (first + (count - 1) * step + 1,))
    largest, sink = _MINUS_INFINITY, _MINUS_INFINITY
    if job[SINKS]:
        head = place // job[ROWS_OF_HEAD]
        sink = carray(float32_pointer(job[SINKS]), (head + 1,))[head]
        largest = sink
    for part in range(count):
        largest = max(largest, lses[first + part * step])
    result = carray(float32_pointer(job[RESULT] + 4 * columns * row), (columns,))
    result[:] = _ZERO
    if largest == _MINUS_INFINITY:
        return
    total = exp_float32(sink - largest) if sink > _MINUS_INFINITY else _ZERO
    for part in range(count):
        lse = lses[first + part * step]
        if lse > _MINUS_INFINITY:
            share = exp_float32(lse - largest)
            total += share
            out = carray(float32_pointer(job[OUTS] + 4 * columns * (first + part * step)), (columns,))
            for i in range(columns):
                result[i] += share * out[i]
    inverse = np.float32(1) / total
    for i in range(columns):
        result[i] *= inverse


@inner
def _merge_chunk(job_address, chunk):
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    first = chunk * job[ROWS_PER_CHUNK]
    for row in range(first, min(first + job[ROWS_PER_CHUNK], job[ROWS])):
        _merge_row(job, row)


@cache
def merge_task() -> int:
    """Address of the compiled task void(int64 job, int64 chunk); compiled or loaded on first use."""

    def task(job: int, chunk: int) -> None:
        _merge_chunk(job, chunk)

    return task_address(task)


@entry("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def run_merge(
    launcher: int,
    state: int,
    task: int,
    outs: int,
    lses: int,
    sinks: int,
    result: int,
    batch: int,
    count: int,
    heads: int,
    positions: int,
    columns: int,
    sequence_step: int,
    part_step: int,
) -> None:
    """See `merge_parts`; addresses, and 0 for no sinks. Steps are in rows."""
    rows = batch * heads * positions
    per_chunk = max(1, min(rows, _ONE_THREAD_ELEMENTS // max(1, count * columns)))
    job = np.empty(JOB_FIELDS, np.int64)
    job[OUTS] = outs
    job[LSES] = lses
    job[SINKS] = sinks
    job[RESULT] = result
    job[COUNT] = count
    job[SEQUENCE_ROWS] = heads * positions
    job[ROWS] = rows
    job[ROWS_OF_HEAD] = positions
    job[COLUMNS] = columns
    job[ROWS_PER_CHUNK] = per_chunk
    job[SEQUENCE_STEP] = sequence_step
    job[PART_STEP] = part_step
    launch(launcher, state, task, job, (rows + per_chunk - 1) // per_chunk)
