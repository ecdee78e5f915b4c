# mypy: allow-untyped-defs
"""Kernels of `expert_mlp`: row blocks of the up and of the down projection, as tasks of a `ThreadPool`.

A task takes the address of its job, a table of int64, and the number of a chunk. A chunk is a block of rows of one
expert. Each weight is fetched from memory once: up to three tokens pass a row at a time, more pass four rows four at
a time while these rows lie in the first-level cache.
"""

from __future__ import annotations

from functools import cache

from cpu_kernels.activation_kernel import gated_row, plain_row
from cpu_kernels.expert_mlp_jobs import (
    ACTIVATION,
    BIAS_OFFSET,
    CHUNKS_PER_EXPERT,
    COLUMNS,
    EXPERTS,
    GROUP_ROWS,
    HAS_GATE,
    HIDDEN_ROWS,
    INPUT_ROWS,
    JOB_FIELDS,
    OUTPUT_ROWS,
    ROWS,
    ROWS_PER_CHUNK,
    WEIGHTS_OFFSET,
)
from cpu_kernels.jit import carray, inner, task_address
from cpu_kernels.simd import (
    CHAINS,
    STEP_BYTES,
    Elements,
    TileShape,
    element_pointer,
    element_to_float32,
    elements_per_step,
    float32_pointer,
    int64_pointer,
    prefetch_four_lines,
    tile_add,
    tile_dot,
    tile_dot_chains,
    tile_dot_tail,
    tile_store,
    tile_zero,
)

_ONE_TOKEN = TileShape(rows=1, tokens=1, chains=CHAINS)
_TWO_TOKENS = TileShape(rows=1, tokens=2, chains=CHAINS)
_THREE_TOKENS = TileShape(rows=1, tokens=3, chains=CHAINS)
_FOUR_BY_FOUR = TileShape(rows=4, tokens=4, chains=1)

# How far ahead of the row at hand to ask for weights: about the bytes that arrive in the latency of memory.
_PREFETCH_BYTES = 4096


@inner
def _row_by_row(elements, shape, weights, columns, rows, inputs, outputs, output_offset, end, following):
    """Dot products of `rows` consecutive weight rows with shape.tokens inputs, stored.

    Weights are fetched ahead: up to about `end`, and from `following` on after that.
    """
    step = elements_per_step(elements)
    row_bytes = columns * (STEP_BYTES // step)
    steps = columns // step
    in_chains = steps // CHAINS * CHAINS
    tail = columns - steps * step
    for row in range(rows):
        here = weights + row * row_bytes
        ahead = here + _PREFETCH_BYTES
        ahead = ahead if ahead < end else ahead - end + following
        tile = tile_zero(shape)
        for i in range(0, in_chains, CHAINS):
            prefetch_four_lines(ahead + i * STEP_BYTES)
            tile = tile_dot_chains(elements, tile, here, row_bytes, inputs, i * STEP_BYTES)
        for i in range(in_chains, steps):
            tile = tile_dot(elements, tile, here, row_bytes, inputs, i * STEP_BYTES)
        if tail > 0:
            tile = tile_dot_tail(elements, tile, here, row_bytes, inputs, steps * STEP_BYTES, tail)
        tile_store(tile, outputs, output_offset + 4 * row)


@inner
def _few_tokens(elements, weights, columns, rows, inputs, outputs, output_offset, tokens, end, following):
    """`rows` consecutive weight rows times up to three tokens."""
    if tokens == 1:
        _row_by_row(elements, _ONE_TOKEN, weights, columns, rows, inputs, outputs, output_offset, end, following)
    elif tokens == 2:
        _row_by_row(elements, _TWO_TOKENS, weights, columns, rows, inputs, outputs, output_offset, end, following)
    elif tokens == 3:
        _row_by_row(elements, _THREE_TOKENS, weights, columns, rows, inputs, outputs, output_offset, end, following)


@inner
def _four_rows(elements, weights, columns, inputs, outputs, output_offset, following):
    """Dot products of four weight rows with four inputs, stored; one chain after the other, all in registers.

    Fetches four rows' worth of weights from `following` on.
    """
    step = elements_per_step(elements)
    row_bytes = columns * (STEP_BYTES // step)
    steps = columns // step
    in_chains = steps // CHAINS * CHAINS
    total = tile_zero(_FOUR_BY_FOUR)
    for i in range(0, in_chains, CHAINS):
        prefetch_four_lines(following + i * STEP_BYTES)
        total = tile_dot(elements, total, weights, row_bytes, inputs, i * STEP_BYTES)
    for i in range(in_chains, steps):
        total = tile_dot(elements, total, weights, row_bytes, inputs, i * STEP_BYTES)
    if columns > steps * step:
        total = tile_dot_tail(elements, total, weights, row_bytes, inputs, steps * STEP_BYTES, columns - steps * step)
    for chain in range(1, CHAINS):
        tile = tile_zero(_FOUR_BY_FOUR)
        fetched = following + chain * row_bytes
        for i in range(0, in_chains, CHAINS):
            prefetch_four_lines(fetched + i * STEP_BYTES)
            tile = tile_dot(elements, tile, weights, row_bytes, inputs, (i + chain) * STEP_BYTES)
        total = tile_add(total, tile)
    tile_store(total, outputs, output_offset)


@inner
def _block(elements, weights, columns, rows, inputs, outputs, output_offset, tokens, following):
    """`rows` consecutive weight rows times all tokens of an expert; `following`: the weights to be read next."""
    row_bytes = columns * (STEP_BYTES // elements_per_step(elements))
    end = weights + rows * row_bytes
    if tokens < 4:
        _few_tokens(elements, weights, columns, rows, inputs, outputs, output_offset, tokens, end, following)
        return
    for group in range(0, rows, GROUP_ROWS):
        here = weights + group * row_bytes
        offset = output_offset + 4 * group
        count = min(GROUP_ROWS, rows - group)
        after = here + count * row_bytes
        after = after if after < end else following
        in_fours = tokens // 4 * 4 if count == GROUP_ROWS else 0
        for token in range(0, in_fours, 4):
            table = 8 * token
            _four_rows(elements, here, columns, inputs + table, outputs + table, offset, after)
        for token in range(in_fours, tokens, 3):
            table = 8 * token
            few = min(3, tokens - token)
            _few_tokens(elements, here, columns, count, inputs + table, outputs + table, offset, few, end, following)


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
    start = bundle + job[WEIGHTS_OFFSET] + first * row_bytes
    for offset in range(0, min(_PREFETCH_BYTES, count * row_bytes), 4 * STEP_BYTES):
        prefetch_four_lines(start + offset)
    for matrix in range(1 + job[HAS_GATE]):
        row = matrix * job[ROWS] + first
        weights = bundle + job[WEIGHTS_OFFSET] + row * row_bytes
        # After the gate's rows come the same rows of up. What follows the chunk, another thread may read: ask again
        # for weights that are at hand.
        following = weights + job[ROWS] * row_bytes if matrix < job[HAS_GATE] else weights
        _block(elements, weights, job[COLUMNS], count, inputs, outputs, 4 * row, tokens, following)
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
