# mypy: allow-untyped-defs
"""Kernels of `expert_mlp`: row blocks of the up and of the down projection, as tasks of a `ThreadPool`.

A task takes the address of its job, a table of int64, and the number of a chunk. A chunk is a block of rows of one
expert. Weights are read in groups of 8 rows, which stay in the first-level cache while all tokens of the expert
pass, 4, 2 or 1 at a time: each weight is fetched from memory once.
"""

from __future__ import annotations

from functools import cache

from cpu_kernels.activation_kernel import gated_row, plain_row
from cpu_kernels.jit import carray, inner, task_address
from cpu_kernels.simd import (
    STEP_BYTES,
    Elements,
    TileShape,
    element_pointer,
    element_to_float32,
    elements_per_step,
    float32_pointer,
    int64_pointer,
    tile_dot,
    tile_dot_tail,
    tile_store,
    tile_zero,
)

# Fields of a job. "Rows" are tables of int64 with the address of one row for every pair.
(
    EXPERTS,  # address of a table [n, 3] of int64: address of the bundle, first pair, end of pairs
    CHUNKS_PER_EXPERT,
    ROWS_PER_CHUNK,
    ROWS,  # rows of one matrix: I of gate and up, H of down
    COLUMNS,
    WEIGHTS_OFFSET,  # bytes from the bundle's start; of the gate where there is one, of up where there is none
    BIAS_OFFSET,  # likewise; 0 where there is no bias
    HAS_GATE,
    INPUT_ROWS,
    OUTPUT_ROWS,
    HIDDEN_ROWS,  # where the activation goes; 0: leave the sums as they are
    ACTIVATION,
    JOB_FIELDS,
) = range(13)

GROUP_ROWS = 8

_ONE_ROW = TileShape(1, 1)
_ONE_TOKEN = TileShape(8, 1)
_TWO_TOKENS = TileShape(8, 2)
_FOUR_TOKENS = TileShape(4, 4)


@inner
def _tile(elements, shape, weights, columns, inputs, outputs, output_offset):
    """Dot products of shape.rows weight rows with shape.tokens inputs, stored."""
    step = elements_per_step(elements)
    row_bytes = columns * (STEP_BYTES // step)
    steps = columns // step
    tile = tile_zero(shape)
    for i in range(steps):
        tile = tile_dot(elements, tile, weights, row_bytes, inputs, i * STEP_BYTES)
    tail = columns - steps * step
    if tail > 0:
        tile = tile_dot_tail(elements, tile, weights, row_bytes, inputs, steps * STEP_BYTES, tail)
    tile_store(tile, outputs, output_offset)


@inner
def _group(elements, weights, columns, inputs, outputs, output_offset, tokens):
    """8 weight rows times all tokens of an expert."""
    half_bytes = columns * (STEP_BYTES // elements_per_step(elements)) * 4
    done = 0
    while tokens - done >= 4:
        table = 8 * done
        _tile(elements, _FOUR_TOKENS, weights, columns, inputs + table, outputs + table, output_offset)
        _tile(
            elements, _FOUR_TOKENS, weights + half_bytes, columns, inputs + table, outputs + table, output_offset + 16
        )
        done += 4
    if tokens - done >= 2:
        _tile(elements, _TWO_TOKENS, weights, columns, inputs + 8 * done, outputs + 8 * done, output_offset)
        done += 2
    if tokens - done == 1:
        _tile(elements, _ONE_TOKEN, weights, columns, inputs + 8 * done, outputs + 8 * done, output_offset)


@inner
def _block(elements, weights, columns, rows, inputs, outputs, output_offset, tokens):
    """`rows` consecutive weight rows times all tokens of an expert."""
    row_bytes = columns * (STEP_BYTES // elements_per_step(elements))
    done = 0
    while rows - done >= GROUP_ROWS:
        _group(elements, weights + done * row_bytes, columns, inputs, outputs, output_offset + 4 * done, tokens)
        done += GROUP_ROWS
    for row in range(done, rows):
        for token in range(tokens):
            table = 8 * token
            offset = output_offset + 4 * row
            _tile(elements, _ONE_ROW, weights + row * row_bytes, columns, inputs + table, outputs + table, offset)


@inner
def _add_bias(elements, bias_address, output_address, count):
    bias = carray(element_pointer(elements, bias_address), (count,))
    output = carray(float32_pointer(output_address), (count,))
    for i in range(count):
        output[i] += element_to_float32(elements, bias[i])


@inner
def run_chunk(elements, job_address, chunk):
    """One block of rows of one expert: its dot products, biases and, for an up projection, its activation."""
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    expert = chunk // job[CHUNKS_PER_EXPERT]
    first = (chunk - expert * job[CHUNKS_PER_EXPERT]) * job[ROWS_PER_CHUNK]
    count = min(job[ROWS_PER_CHUNK], job[ROWS] - first)
    entry = carray(int64_pointer(job[EXPERTS] + 24 * expert), (3,))
    bundle, first_pair, tokens = entry[0], entry[1], entry[2] - entry[1]
    element_bytes = STEP_BYTES // elements_per_step(elements)
    row_bytes = job[COLUMNS] * element_bytes
    inputs = job[INPUT_ROWS] + 8 * first_pair
    outputs = job[OUTPUT_ROWS] + 8 * first_pair
    for matrix in range(1 + job[HAS_GATE]):
        row = matrix * job[ROWS] + first
        weights = bundle + job[WEIGHTS_OFFSET] + row * row_bytes
        _block(elements, weights, job[COLUMNS], count, inputs, outputs, 4 * row, tokens)
    output_rows = carray(int64_pointer(outputs), (tokens,))
    if job[BIAS_OFFSET] > 0:
        for matrix in range(1 + job[HAS_GATE]):
            row = matrix * job[ROWS] + first
            bias = bundle + job[BIAS_OFFSET] + row * element_bytes
            for token in range(tokens):
                _add_bias(elements, bias, output_rows[token] + 4 * row, count)
    if job[HIDDEN_ROWS] > 0:
        hidden_rows = carray(int64_pointer(job[HIDDEN_ROWS] + 8 * first_pair), (tokens,))
        for token in range(tokens):
            sums = output_rows[token] + 4 * first
            target = hidden_rows[token] + element_bytes * first
            if job[HAS_GATE] > 0:
                gated_row(elements, job[ACTIVATION], sums, sums + 4 * job[ROWS], target, count)
            else:
                plain_row(elements, job[ACTIVATION], sums, target, count)


@cache
def rows_task(elements: Elements) -> int:
    """Address of the compiled task void(int64 job, int64 chunk) for these elements; compiled or loaded on first use."""

    def task(job: int, chunk: int) -> None:
        run_chunk(elements, job, chunk)

    return task_address(task)
