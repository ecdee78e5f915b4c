# mypy: allow-untyped-defs
"""Kernels of `expert_mlp`: row blocks of the up and of the down projection, as tasks of a `ThreadPool`.

A task takes the address of its job, a table of int64, and the number of a run of chunks (`chunk_runs`), which is one
chunk where chunks do not cost about the same. A chunk is a block of rows of one expert.
"""

from __future__ import annotations

from functools import cache

from cpu_kernels.activation_kernel import gated_row, plain_row
from cpu_kernels.chunk_runs import chunks_of_run
from cpu_kernels.expert_mlp_jobs import (
    ACTIVATION,
    BIAS_OFFSET,
    CHUNKS,
    CHUNKS_PER_EXPERT,
    COLUMNS,
    EXPERTS,
    HAS_GATE,
    HIDDEN_ROWS,
    INPUT_ROWS,
    JOB_FIELDS,
    OUTPUT_ROWS,
    ROWS,
    ROWS_PER_CHUNK,
    RUN_THREADS,
    WEIGHTS_OFFSET,
)
from cpu_kernels.jit import carray, inner, task_address
from cpu_kernels.row_blocks import PREFETCH_BYTES, multiply_rows
from cpu_kernels.simd import (
    STEP_BYTES,
    Elements,
    element_pointer,
    element_to_float32,
    elements_per_step,
    float32_pointer,
    int64_pointer,
    prefetch_four_lines,
)


@inner
def _add_bias(elements, bias_address, output_address, count):
    bias = carray(element_pointer(elements, bias_address), (count,))
    output = carray(float32_pointer(output_address), (count,))
    for i in range(count):
        output[i] += element_to_float32(elements, bias[i])


@inner
def _run_chunk(elements, job, chunk):
    """One block of rows of one expert: its dot products, biases and, for an up projection, its activation."""
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
    for offset in range(0, min(PREFETCH_BYTES, count * row_bytes), 4 * STEP_BYTES):
        prefetch_four_lines(start + offset)
    for matrix in range(1 + job[HAS_GATE]):
        row = matrix * job[ROWS] + first
        weights = bundle + job[WEIGHTS_OFFSET] + row * row_bytes
        # After the gate's rows come the same rows of up. What follows the chunk, another thread may read: ask again
        # for weights that are at hand.
        following = weights + job[ROWS] * row_bytes if matrix < job[HAS_GATE] else weights
        multiply_rows(elements, weights, job[COLUMNS], count, inputs, outputs, 4 * row, tokens, following)
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


@inner
def _run(elements, job_address, run):
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    first, end = chunks_of_run(run, job[CHUNKS], job[RUN_THREADS])
    for chunk in range(first, end):
        _run_chunk(elements, job, chunk)


@cache
def rows_task(elements: Elements) -> int:
    """Address of the compiled task void(int64 job, int64 run) for these elements; compiled or loaded on first use."""

    def task(job: int, run: int) -> None:
        _run(elements, job, run)

    return task_address(task)
