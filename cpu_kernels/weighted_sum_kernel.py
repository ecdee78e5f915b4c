# mypy: allow-untyped-defs
"""Kernel of `weighted_sum`: a chunk is a number of tokens."""

from __future__ import annotations

from functools import cache

import numpy as np

from cpu_kernels.jit import carray, entry, inner, task_address
from cpu_kernels.launch import launch
from cpu_kernels.simd import float32_pointer, int64_pointer

OUTPUTS, WEIGHTS, OUT, TOP_K, COLUMNS, TOKENS, TOKENS_PER_CHUNK, JOB_FIELDS = range(8)

_ONE_THREAD_ELEMENTS = 1 << 16


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
