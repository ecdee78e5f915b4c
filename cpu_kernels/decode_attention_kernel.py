# mypy: allow-untyped-defs
"""Kernel of `decode_attention`: a chunk is a run of cached tokens of one key-value head, with all its query heads.

A chunk leaves the largest score, the sum of exponentials and the weighted sum of values of each query head; these are
combined at the end, as in flash decoding (Dao et al., 2023). Runs have a fixed length, so that the result does not
depend on the number of threads.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from cpu_kernels.activation_kernel import exp_float32
from cpu_kernels.jit import carray, entry, inner, inner_fused, task_address
from cpu_kernels.launch import launch, run_inline
from cpu_kernels.row_blocks import multiply_rows
from cpu_kernels.simd import (
    Elements,
    element_pointer,
    element_to_float32,
    float32_pointer,
    float32_to_element,
    int64_pointer,
)
from cpu_kernels.threads_kernel import call_task

(
    QUERIES,  # address of a table of int64, the address of each sequence's each query head
    KEYS,
    KEY_BATCH_BYTES,
    KEY_HEAD_BYTES,
    VALUES,
    VALUE_BATCH_BYTES,
    VALUE_HEAD_BYTES,
    VALUE_TOKEN_BYTES,
    KV_HEADS,
    GROUP,  # query heads of a key-value head
    TOKENS,
    RUNS,
    KEY_WIDTH,
    VALUE_WIDTH,
    ELEMENT_BYTES,
    SCALE,  # as its bits
    PARTS,  # address of fp32 [batch, query heads, runs, value width + 2]: weighted sum, largest score, sum
    OUT,
    JOB_FIELDS,
) = range(19)

_RUN_TOKENS = 256
# Below this, starting a region of threads takes longer than what a second thread saves.
_ONE_THREAD_ELEMENTS = 1 << 15
_FOUR = 4


@inner
def _exponentials(scores, scale):
    """exp(scale score - largest) in place; returns the largest and the sum, in an order that is fixed."""
    largest = scores[0] * scale
    for i in range(len(scores)):
        scores[i] *= scale
        largest = max(largest, scores[i])
    lanes = np.zeros(16, np.float32)
    for i in range(len(scores)):
        below = scores[i] - largest
        # The exponential of a NaN is a number; the difference keeps it.
        scores[i] = exp_float32(below) + (below - below)
    full = len(scores) // 16 * 16
    for i in range(0, full, 16):
        for lane in range(16):
            lanes[lane] += scores[i + lane]
    total = np.float32(0)
    for lane in range(16):
        total += lanes[lane]
    for i in range(full, len(scores)):
        total += scores[i]
    return largest, total


@inner_fused
def _add_four(sums, weights, rows):
    """Sums += weights[0] rows[0] + ... + weights[3] rows[3], from left to right."""
    a, b, c, d = weights[0], weights[1], weights[2], weights[3]
    first, second, third, fourth = rows[0], rows[1], rows[2], rows[3]
    for i in range(len(sums)):
        sums[i] = sums[i] + a * first[i] + b * second[i] + c * third[i] + d * fourth[i]


@inner
def _weigh_values(elements, job, values, tokens, scores, rows, parts):
    """Weighted sums of a run's values for each head of the group; rows: fp32 [4, value width] of scratch."""
    width = job[VALUE_WIDTH]
    for head in range(job[GROUP]):
        for i in range(width):
            parts[head, 0, i] = np.float32(0)
    for token in range(0, tokens, _FOUR):
        for row in range(_FOUR):
            if token + row < tokens:
                address = values + (token + row) * job[VALUE_TOKEN_BYTES]
                value = carray(element_pointer(elements, address), (width,))
                for i in range(width):
                    rows[row, i] = element_to_float32(elements, value[i])
            else:
                for i in range(width):
                    rows[row, i] = np.float32(0)
        for head in range(job[GROUP]):
            _add_four(parts[head, 0, :width], scores[head, token : token + _FOUR], rows)


@inner
def _run(elements, job, sequence, kv_head, run, scores, table, rows):
    """One run of tokens; scores: fp32 [group, run tokens], table: int64 [group], rows: fp32 [4, value width]."""
    group = job[GROUP]
    first = run * _RUN_TOKENS
    tokens = min(_RUN_TOKENS, job[TOKENS] - first)
    keys = job[KEYS] + sequence * job[KEY_BATCH_BYTES] + kv_head * job[KEY_HEAD_BYTES]
    keys += first * job[KEY_WIDTH] * job[ELEMENT_BYTES]
    values = job[VALUES] + sequence * job[VALUE_BATCH_BYTES] + kv_head * job[VALUE_HEAD_BYTES]
    values += first * job[VALUE_TOKEN_BYTES]
    head = (sequence * job[KV_HEADS] + kv_head) * group
    for row in range(group):
        table[row] = scores.ctypes.data + 4 * _RUN_TOKENS * row
    queries = job[QUERIES] + 8 * head
    multiply_rows(elements, keys, job[KEY_WIDTH], tokens, queries, np.int64(table.ctypes.data), 0, group, keys)
    part_width = job[VALUE_WIDTH] + 2
    address = job[PARTS] + 4 * part_width * (head * job[RUNS] + run)
    parts = carray(float32_pointer(address), (group, job[RUNS], part_width))
    scale = carray(float32_pointer(job.ctypes.data + 8 * SCALE), (1,))[0]
    for row in range(group):
        largest, total = _exponentials(scores[row, :tokens], scale)
        parts[row, 0, part_width - 2], parts[row, 0, part_width - 1] = largest, total
        for token in range(tokens, (tokens + _FOUR - 1) // _FOUR * _FOUR):
            scores[row, token] = np.float32(0)
    _weigh_values(elements, job, values, tokens, scores, rows, parts)


@inner
def run_chunk(elements, job_address, chunk):
    """One run of one key-value head of one sequence."""
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    head = chunk // job[RUNS]
    sequence = head // job[KV_HEADS]
    scores = np.empty((job[GROUP], _RUN_TOKENS), np.float32)
    table = np.empty(job[GROUP], np.int64)
    rows = np.empty((_FOUR, job[VALUE_WIDTH]), np.float32)
    kv_head = head - sequence * job[KV_HEADS]
    _run(elements, job, sequence, kv_head, chunk - head * job[RUNS], scores, table, rows)


@inner
def _combine(elements, job_address, heads):
    """Every head's result from those of its runs."""
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    runs, width = job[RUNS], job[VALUE_WIDTH]
    parts = carray(float32_pointer(job[PARTS]), (heads, runs, width + 2))
    for head in range(heads):
        largest = parts[head, 0, width]
        for run in range(1, runs):
            largest = max(largest, parts[head, run, width])
        total = np.float32(0)
        for run in range(runs):
            share = exp_float32(parts[head, run, width] - largest)
            total += share * parts[head, run, width + 1]
            for i in range(width):
                parts[head, run, i] *= share
        for run in range(1, runs):
            for i in range(width):
                parts[head, 0, i] += parts[head, run, i]
        out = carray(element_pointer(elements, job[OUT] + head * width * job[ELEMENT_BYTES]), (width,))
        for i in range(width):
            out[i] = float32_to_element(elements, parts[head, 0, i] / total)


@cache
def run_task(elements: Elements) -> int:
    """Address of the compiled task void(int64 job, int64 chunk) for these elements; compiled or loaded on first use."""

    def task(job: int, chunk: int) -> None:
        run_chunk(elements, job, chunk)

    return task_address(task)


@cache
def combine_task(elements: Elements) -> int:
    """Address of the compiled task void(int64 job, int64 heads) that ends the work."""

    def task(job: int, heads: int) -> None:
        _combine(elements, job, heads)

    return task_address(task)


@inner
def _finish(task, job, heads):
    # The array lives until this returns.
    call_task(task, job.ctypes.data, heads)


_I64 = ", ".join(["int64"] * 22)


@entry(f"void({_I64}, float32)")
def run_decode_attention(
    launcher: int, state: int, task: int, ending: int, element_bytes: int, batch: int, kv_heads: int, group: int,
    tokens: int, key_width: int, value_width: int, q: int, q_batch: int, q_head: int,
    k: int, k_batch: int, k_head: int, v: int, v_batch: int, v_head: int, v_token: int, out: int, scale: float,
) -> None:  # fmt: skip
    """Attend, all tensors given by their addresses and their strides in elements; out [batch, heads, value width]."""
    heads = batch * kv_heads * group
    runs = (tokens + _RUN_TOKENS - 1) // _RUN_TOKENS
    job = np.empty(JOB_FIELDS + heads + (heads * runs * (value_width + 2) + 1) // 2, np.int64)
    job[QUERIES] = job.ctypes.data + 8 * JOB_FIELDS
    for head in range(heads):
        sequence = head // (kv_heads * group)
        offset = sequence * q_batch + (head - sequence * kv_heads * group) * q_head
        job[JOB_FIELDS + head] = q + offset * element_bytes
    job[KEYS] = k
    job[KEY_BATCH_BYTES] = k_batch * element_bytes
    job[KEY_HEAD_BYTES] = k_head * element_bytes
    job[VALUES] = v
    job[VALUE_BATCH_BYTES] = v_batch * element_bytes
    job[VALUE_HEAD_BYTES] = v_head * element_bytes
    job[VALUE_TOKEN_BYTES] = v_token * element_bytes
    job[KV_HEADS] = kv_heads
    job[GROUP] = group
    job[TOKENS] = tokens
    job[RUNS] = runs
    job[KEY_WIDTH] = key_width
    job[VALUE_WIDTH] = value_width
    job[ELEMENT_BYTES] = element_bytes
    job[SCALE : SCALE + 1].view(np.float32)[0] = scale
    job[PARTS] = job.ctypes.data + 8 * (JOB_FIELDS + heads)
    job[OUT] = out
    chunks = batch * kv_heads * runs
    if batch * kv_heads * tokens * (key_width + value_width) <= _ONE_THREAD_ELEMENTS:
        run_inline(task, job, chunks)
    else:
        launch(launcher, state, task, job, chunks)
    _finish(ending, job, heads)
