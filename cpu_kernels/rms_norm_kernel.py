# mypy: allow-untyped-defs
"""Kernel of `rms_norm`: a chunk is a number of rows, and a row is read from memory once."""

from __future__ import annotations

from functools import cache

import numpy as np

from cpu_kernels.jit import carray, entry, inner, task_address
from cpu_kernels.launch import launch
from cpu_kernels.row_blocks import multiply_rows
from cpu_kernels.simd import (
    Elements,
    element_pointer,
    element_to_float32,
    float32_from_bits,
    float32_to_element,
    int64_pointer,
)

# Where the weight comes in; see `rms_norm`.
PLAIN, ROUNDED, PLUS_ONE = range(3)

X, WEIGHT, OUT, ROWS, COLUMNS, ROW_BYTES, EPSILON, ROWS_PER_CHUNK, TABLES, FORM, JOB_FIELDS = range(11)

_ONE_THREAD_ELEMENTS = 1 << 16
_ONE = np.float32(1)


@inner
def _row(elements, form, x_address, weight_address, out_address, columns, epsilon, table):
    """One row; table: address of three words of scratch."""
    words = carray(int64_pointer(table), (3,))
    words[0], words[1] = x_address, table + 16
    multiply_rows(elements, x_address, columns, 1, table, table + 8, 0, 1, x_address)
    squares = float32_from_bits(np.int32(words[2] & 0xFFFFFFFF))
    scale = _ONE / np.sqrt(squares / np.float32(columns) + epsilon)
    x = carray(element_pointer(elements, x_address), (columns,))
    weight = carray(element_pointer(elements, weight_address), (columns,))
    out = carray(element_pointer(elements, out_address), (columns,))
    if form == PLAIN:
        for i in range(columns):
            scaled = element_to_float32(elements, x[i]) * scale
            out[i] = float32_to_element(elements, element_to_float32(elements, weight[i]) * scaled)
    elif form == ROUNDED:
        for i in range(columns):
            scaled = float32_to_element(elements, element_to_float32(elements, x[i]) * scale)
            product = element_to_float32(elements, weight[i]) * element_to_float32(elements, scaled)
            out[i] = float32_to_element(elements, product)
    else:
        for i in range(columns):
            scaled = element_to_float32(elements, x[i]) * scale
            out[i] = float32_to_element(elements, scaled * (_ONE + element_to_float32(elements, weight[i])))


@inner
def run_chunk(elements, job_address, chunk):
    """Some rows."""
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    epsilon = float32_from_bits(np.int32(job[EPSILON]))
    first = chunk * job[ROWS_PER_CHUNK]
    table = job[TABLES] + 64 * chunk
    for row in range(first, min(first + job[ROWS_PER_CHUNK], job[ROWS])):
        offset = row * job[ROW_BYTES]
        _row(elements, job[FORM], job[X] + offset, job[WEIGHT], job[OUT] + offset, job[COLUMNS], epsilon, table)


@cache
def rms_norm_task(elements: Elements) -> int:
    """Address of the compiled task void(int64 job, int64 chunk) for these elements; compiled or loaded on first use."""

    def task(job: int, chunk: int) -> None:
        run_chunk(elements, job, chunk)

    return task_address(task)


_I64 = ", ".join(["int64"] * 10)


@entry(f"void({_I64}, float32)")
def run_rms_norm(
    launcher: int,
    state: int,
    task: int,
    form: int,
    element_bytes: int,
    x: int,
    weight: int,
    rows: int,
    columns: int,
    out: int,
    epsilon: float,
) -> None:
    """Rows of x [rows, columns] to out, both contiguous, given by their addresses."""
    per_chunk = max(1, min(rows, _ONE_THREAD_ELEMENTS // columns))
    chunks = (rows + per_chunk - 1) // per_chunk
    job = np.empty((JOB_FIELDS + 7) // 8 * 8 + 8 * chunks, np.int64)
    job[X] = x
    job[WEIGHT] = weight
    job[OUT] = out
    job[ROWS] = rows
    job[COLUMNS] = columns
    job[ROW_BYTES] = columns * element_bytes
    job[EPSILON] = np.float32(epsilon).view(np.int32)
    job[ROWS_PER_CHUNK] = per_chunk
    job[FORM] = form
    job[TABLES] = job.ctypes.data + 8 * ((JOB_FIELDS + 7) // 8 * 8)
    launch(launcher, state, task, job, chunks)
