# mypy: allow-untyped-defs
"""Kernel of `linear`: a chunk is a block of weight rows, times all tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from cpu_kernels.jit import carray, entry, inner, task_address
from cpu_kernels.launch import launch
from cpu_kernels.row_blocks import GROUP_ROWS, PREFETCH_BYTES, multiply_rows
from cpu_kernels.simd import (
    Elements,
    element_pointer,
    element_to_float32,
    float32_pointer,
    float32_to_element,
    int64_pointer,
    prefetch_four_lines,
)

# Fields of a job. Behind it lie tables [tokens] of addresses, of the inputs, of fp32 sums and of the outputs, and then
# the sums [tokens, rows].
(
    WEIGHT,
    BIAS,  # 0 where there is none
    ROWS,
    COLUMNS,
    ROW_BYTES,
    ELEMENT_BYTES,
    TOKENS,
    ROWS_PER_CHUNK,
    JOB_FIELDS,
) = range(9)

# Below this, starting a region of threads takes longer than what a second thread saves.
_ONE_THREAD_BYTES = 128 << 10
_CHUNK_BYTES = 256 << 10
_CHUNKS = 16


@inner
def run_chunk(elements, job_address, chunk):
    """One block of weight rows: dot products with all tokens in fp32, plus bias, rounded to elements."""
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    first = chunk * job[ROWS_PER_CHUNK]
    count = min(job[ROWS_PER_CHUNK], job[ROWS] - first)
    tokens = job[TOKENS]
    weights = job[WEIGHT] + first * job[ROW_BYTES]
    for offset in range(0, min(PREFETCH_BYTES, count * job[ROW_BYTES]), 256):
        prefetch_four_lines(weights + offset)
    inputs = job_address + 8 * JOB_FIELDS
    sums = inputs + 8 * tokens
    multiply_rows(elements, weights, job[COLUMNS], count, inputs, sums, 4 * first, tokens, weights)
    sum_rows = carray(int64_pointer(sums), (tokens,))
    output_rows = carray(int64_pointer(sums + 8 * tokens), (tokens,))
    for token in range(tokens):
        row = carray(float32_pointer(sum_rows[token] + 4 * first), (count,))
        if job[BIAS] > 0:
            bias = carray(element_pointer(elements, job[BIAS] + first * job[ELEMENT_BYTES]), (count,))
            for i in range(count):
                row[i] += element_to_float32(elements, bias[i])
        out = carray(element_pointer(elements, output_rows[token] + first * job[ELEMENT_BYTES]), (count,))
        for i in range(count):
            out[i] = float32_to_element(elements, row[i])


@cache
def linear_task(elements: Elements) -> int:
    """Address of the compiled task void(int64 job, int64 chunk) for these elements; compiled or loaded on first use."""

    def task(job: int, chunk: int) -> None:
        run_chunk(elements, job, chunk)

    return task_address(task)


_I64 = ", ".join(["int64"] * 11)


@entry(f"void({_I64})")
def run_linear(
    launcher: int,
    state: int,
    task: int,
    element_bytes: int,
    x: int,
    tokens: int,
    weight: int,
    bias: int,
    rows: int,
    columns: int,
    out: int,
) -> None:
    """Out [tokens, rows] = x [tokens, columns] weight^T + bias, all of them contiguous, given by their addresses."""
    tables = JOB_FIELDS + 3 * tokens
    job = np.empty(tables + (tokens * rows + 1) // 2, np.int64)
    sums = job.ctypes.data + 8 * tables
    row_bytes = columns * element_bytes
    total_bytes = rows * row_bytes
    chunks = 1
    if total_bytes > _ONE_THREAD_BYTES:
        chunks = max(_CHUNKS, total_bytes // _CHUNK_BYTES)
    per_chunk = ((rows + chunks - 1) // chunks + GROUP_ROWS - 1) // GROUP_ROWS * GROUP_ROWS
    job[WEIGHT] = weight
    job[BIAS] = bias
    job[ROWS] = rows
    job[COLUMNS] = columns
    job[ROW_BYTES] = row_bytes
    job[ELEMENT_BYTES] = element_bytes
    job[TOKENS] = tokens
    job[ROWS_PER_CHUNK] = per_chunk
    for token in range(tokens):
        job[JOB_FIELDS + token] = x + token * row_bytes
        job[JOB_FIELDS + tokens + token] = sums + 4 * token * rows
        job[JOB_FIELDS + 2 * tokens + token] = out + token * rows * element_bytes
    launch(launcher, state, task, job, (rows + per_chunk - 1) // per_chunk)


@entry("void(int64, int64, int64, int64, int64, int64[:, ::1], int64)")
def run_products(launcher: int, state: int, task: int, element_bytes: int, x: int, places: Any, columns: int) -> None:
    """`run_linear` of one token with several weights; places are int64 [weights, 3]: address, rows, and where to."""
    for index in range(len(places)):
        run_linear(
            launcher, state, task, element_bytes, x, 1, places[index, 0], 0, places[index, 1], columns, places[index, 2]
        )
