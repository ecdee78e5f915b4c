# mypy: allow-untyped-defs
"""Kernels of `weighted_sum`, whose chunks are tokens, and of `add_weighted`, whose chunks are columns."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from cpu_kernels.jit import carray, entry, inner, task_address
from cpu_kernels.launch import launch
from cpu_kernels.simd import float32_pointer, int64_pointer

OUTPUTS, WEIGHTS, OUT, TOP_K, COLUMNS, TOKENS, TOKENS_PER_CHUNK, JOB_FIELDS = range(8)

(
    ADD_SUM,
    ADD_OUTPUTS,
    ADD_WEIGHTS,
    ADD_WEIGHTS_COUNT,
    ADD_ROWS,
    ADD_TOKENS,
    ADD_PAIRS,
    ADD_COLUMNS,
    ADD_FIELDS,
) = range(9)

_ONE_THREAD_ELEMENTS = 1 << 16
# Two kilobytes of a row are a run that the hardware's prefetcher follows, and one of few chunks for each thread.
_COLUMNS_AT_ONCE = 512


@inner
def _sum_chunk(job_address, chunk):
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    top_k, columns = job[TOP_K], job[COLUMNS]
    first = chunk * job[TOKENS_PER_CHUNK]
    for token in range(first, min(first + job[TOKENS_PER_CHUNK], job[TOKENS])):
        rows = carray(float32_pointer(job[OUTPUTS] + 4 * token * top_k * columns), (top_k, columns))
        weights = carray(float32_pointer(job[WEIGHTS] + 4 * token * top_k), (top_k,))
        out = carray(float32_pointer(job[OUT] + 4 * token * columns), (columns,))
        for i in range(columns):
            out[i] = np.float32(0)
        for place in range(top_k):
            weight, row = weights[place], rows[place]
            for i in range(columns):
                out[i] += weight * row[i]


@cache
def weighted_sum_task() -> int:
    """Address of the compiled task void(int64 job, int64 chunk); compiled or loaded on first use."""

    def task(job: int, chunk: int) -> None:
        _sum_chunk(job, chunk)

    return task_address(task)


@inner
def _add_chunk(job_address, chunk):
    job = carray(int64_pointer(job_address), (ADD_FIELDS,))
    columns = job[ADD_COLUMNS]
    first = chunk * _COLUMNS_AT_ONCE
    count = min(_COLUMNS_AT_ONCE, columns - first)
    rows = carray(int64_pointer(job[ADD_ROWS]), (job[ADD_PAIRS],))
    tokens = carray(int64_pointer(job[ADD_TOKENS]), (job[ADD_PAIRS],))
    weights = carray(float32_pointer(job[ADD_WEIGHTS]), (job[ADD_WEIGHTS_COUNT],))
    for pair in range(job[ADD_PAIRS]):
        row = carray(float32_pointer(job[ADD_OUTPUTS] + 4 * (pair * columns + first)), (count,))
        total = carray(float32_pointer(job[ADD_SUM] + 4 * (tokens[pair] * columns + first)), (count,))
        weight = weights[rows[pair]]
        for i in range(count):
            total[i] += weight * row[i]


@cache
def add_weighted_task() -> int:
    """Address of the compiled task void(int64 job, int64 chunk); compiled or loaded on first use."""

    def task(job: int, chunk: int) -> None:
        _add_chunk(job, chunk)

    return task_address(task)


@entry("boolean(int64, int64, int64, int64, int64, int64, int64, int64[::1], int64[::1], int64)")
def run_add_weighted(
    launcher: int,
    state: int,
    task: int,
    sums: int,
    sum_rows: int,
    outputs: int,
    weights: int,
    rows: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int64],
    columns: int,
) -> bool:
    """Add weights[rows[p]] outputs[p] to sums[tokens[p]] for each pair p in turn; False where a token has no row."""
    job = np.empty(ADD_FIELDS, np.int64)
    most = np.int64(0)
    for pair in range(len(rows)):
        if tokens[pair] < 0 or tokens[pair] >= sum_rows or rows[pair] < 0:
            return False
        most = max(most, rows[pair] + 1)
    job[ADD_SUM] = sums
    job[ADD_OUTPUTS] = outputs
    job[ADD_WEIGHTS] = weights
    job[ADD_WEIGHTS_COUNT] = most
    job[ADD_ROWS] = rows.ctypes.data
    job[ADD_TOKENS] = tokens.ctypes.data
    job[ADD_PAIRS] = len(rows)
    job[ADD_COLUMNS] = columns
    launch(launcher, state, task, job, (columns + _COLUMNS_AT_ONCE - 1) // _COLUMNS_AT_ONCE)
    return True


@entry("void(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def run_weighted_sum(
    launcher: int, state: int, task: int, outputs: int, weights: int, tokens: int, top_k: int, columns: int, out: int
) -> None:
    """Out [tokens, columns] = sum over k of weights [tokens, k] outputs [tokens, k, columns], given by addresses."""
    per_chunk = max(1, min(tokens, _ONE_THREAD_ELEMENTS // max(1, top_k * columns)))
    job = np.empty(JOB_FIELDS, np.int64)
    job[OUTPUTS] = outputs
    job[WEIGHTS] = weights
    job[OUT] = out
    job[TOP_K] = top_k
    job[COLUMNS] = columns
    job[TOKENS] = tokens
    job[TOKENS_PER_CHUNK] = per_chunk
    launch(launcher, state, task, job, (tokens + per_chunk - 1) // per_chunk)
