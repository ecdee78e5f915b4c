# mypy: allow-untyped-defs
"""Kernel of `decode_attention`: a run is some cached tokens of one key-value head, with all its query heads.

A run goes through its tokens with an online softmax (Milakov and Gimelshein, 2018) and leaves the largest score, the
sum of exponentials and the weighted sum of values of each query head; these are combined at the end, as in flash
decoding (Dao et al., 2023). How long runs are follows from the number of tokens, so that the
result depends neither on the threads nor on other sequences.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from cpu_kernels.activation_kernel import exp_float32
from cpu_kernels.jit import carray, entry, inner, task_address
from cpu_kernels.key_rows_simd import takes_pairs
from cpu_kernels.kv_rows import score_rows, weigh_rows
from cpu_kernels.kv_simd import KvCode
from cpu_kernels.kv_softmax import exponentials_and_sum, scale_row, scale_row_largest
from cpu_kernels.launch import launch, run_inline
from cpu_kernels.simd import (
    Elements,
    element_pointer,
    element_to_float32,
    float32_pointer,
    float32_to_element,
    int64_pointer,
)

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
    RUN_TOKENS,  # of a run
    RUNS,
    CHUNK_RUNS,  # consecutive runs, through all heads, that a chunk has at most
    ALL_RUNS,
    KEY_WIDTH,
    VALUE_WIDTH,
    ELEMENT_BYTES,
    SCALE,  # as its bits
    SINKS,  # address of fp32, a score without a value for each query head; 0: there are none
    PARTS,  # address of fp32 [batch, query heads, runs, value width + 2]: weighted sum, largest score, sum
    OUT,
    JOB_FIELDS,
) = range(23)

_LANES = 16
# Tokens whose scores are turned into weights at once, and of which keys or values stay in the first-level cache.
_PART_TOKENS, _NEAR_TOKENS = 256, 64
# More tokens make runs longer: the results of each are read again.
_MOST_RUNS = 16
# A thread goes through several runs of a chunk, so that it can ask for what it reads next.
_CHUNKS_PER_THREAD = 4
# Below this, starting a region of threads takes longer than what a second thread saves.
_ONE_THREAD_ELEMENTS = 1 << 15
_FAR_BELOW = np.float32(1000)
_WIDE, _WIDE_ELEMENTS = KvCode("fp32"), Elements("fp32", "generic")


@inner
def _whole_lanes(count):
    return (count + _LANES - 1) // _LANES * _LANES


@inner
def _widen(elements, address, nbytes, width, rows, out):
    """Rows of elements as fp32 rows of whole lanes, zero behind their ends; out: fp32 [rows, whole lanes]."""
    for row in range(rows):
        source = carray(element_pointer(elements, address + row * nbytes), (width,))
        for i in range(width):
            out[row, i] = element_to_float32(elements, source[i])
        for i in range(width, out.shape[1]):
            out[row, i] = np.float32(0)


@inner
def _has_pairs(elements, width):
    return takes_pairs(elements) and width % (2 * _LANES) == 0


@inner
def _take_query(elements, address, width, out):
    """A query as keys are multiplied with it; out: fp32 [1, whole lanes]."""
    if _has_pairs(elements, width):
        words = carray(int64_pointer(address), (width // 4,))
        copied = carray(int64_pointer(out.ctypes.data), (width // 4,))
        for i in range(width // 4):
            copied[i] = words[i]
    else:
        _widen(elements, address, 0, width, 1, out)


@inner
def _score(elements, plain, code, job, keys, tokens, queries, scores, wide, ahead):
    """Scores of a part's tokens; asks for as many bytes from `ahead` on as there are keys."""
    width, group = job[KEY_WIDTH], job[GROUP]
    nbytes, query_nbytes, score_nbytes = width * job[ELEMENT_BYTES], 4 * queries.shape[1], 4 * _PART_TOKENS
    for token in range(0, tokens, _NEAR_TOKENS):
        count = min(_NEAR_TOKENS, tokens - token)
        at, out = keys + token * nbytes, scores.ctypes.data + 4 * token
        if _has_pairs(elements, width):
            score_rows(elements, code, at, nbytes, width // (2 * _LANES), count, queries.ctypes.data, query_nbytes,
                       group, out, score_nbytes, ahead + token * nbytes)  # fmt: skip
        elif width % _LANES == 0:
            score_rows(plain, code, at, nbytes, width // _LANES, count, queries.ctypes.data, query_nbytes, group, out,
                       score_nbytes, ahead + token * nbytes)  # fmt: skip
        else:
            rows = wide[:, : queries.shape[1]]
            _widen(elements, at, nbytes, width, count, rows)
            score_rows(_WIDE_ELEMENTS, _WIDE, rows.ctypes.data, 4 * wide.shape[1], queries.shape[1] // _LANES, count,
                       queries.ctypes.data, query_nbytes, group, out, score_nbytes, at)  # fmt: skip


@inner
def _weigh(elements, code, job, values, tokens, scores, sums, wide, ahead):
    """Adds a part's weighted values; asks for as many bytes from `ahead` on as there are values."""
    width, group = job[VALUE_WIDTH], job[GROUP]
    nbytes, sum_nbytes, score_nbytes = job[VALUE_TOKEN_BYTES], 4 * sums.shape[1], 4 * _PART_TOKENS
    for token in range(0, tokens, _NEAR_TOKENS):
        count = min(_NEAR_TOKENS, tokens - token)
        at, weights = values + token * nbytes, scores.ctypes.data + 4 * token
        if width % _LANES == 0:
            weigh_rows(code, at, nbytes, width // _LANES, count, weights, score_nbytes, group, sums.ctypes.data,
                       sum_nbytes, ahead + token * nbytes)  # fmt: skip
        else:
            rows = wide[:, : sums.shape[1]]
            _widen(elements, at, nbytes, width, count, rows)
            weigh_rows(_WIDE, rows.ctypes.data, 4 * wide.shape[1], sums.shape[1] // _LANES, count, weights,
                       score_nbytes, group, sums.ctypes.data, sum_nbytes, at)  # fmt: skip


@inner
def _soften(job, tokens, scores, sums, state):
    """Scores of a part turned into weights below the largest score so far; what was summed before is brought to it.

    state: fp32 [group, 2], the largest score and the sum of weights.
    """
    lanes = _whole_lanes(tokens)
    scale = carray(float32_pointer(job.ctypes.data + 8 * SCALE), (1,))[0]
    for row in range(job[GROUP]):
        mine = scores[row, :lanes]
        for token in range(tokens, lanes):
            mine[token] = mine[0]
        largest, before = scale_row_largest(mine.ctypes.data, scale, lanes), state[row, 0]
        if not largest > before:
            largest = before
        # They add less to the sum, which is at least one, than half of its last bit.
        for token in range(tokens, lanes):
            mine[token] = largest - _FAR_BELOW
        total = exponentials_and_sum(mine.ctypes.data, largest, lanes)
        if before > -np.inf and largest != before:
            share = exp_float32(before - largest)
            scale_row(sums[row].ctypes.data, share, sums.shape[1])
            total += state[row, 1] * share
        elif before > -np.inf:
            total += state[row, 1]
        state[row, 0], state[row, 1] = largest, total


@inner
def _keys(job, head):
    """Address of a key-value head's keys; heads are numbered through all sequences."""
    sequence = head // job[KV_HEADS]
    return job[KEYS] + sequence * job[KEY_BATCH_BYTES] + (head - sequence * job[KV_HEADS]) * job[KEY_HEAD_BYTES]


@inner
def _run(elements, plain, code, job, head, run, following, queries, scores, sums, state, wide):
    """One run of tokens of a key-value head; following: address of the keys of the next one."""
    group, sequence = job[GROUP], head // job[KV_HEADS]
    kv_head = head - sequence * job[KV_HEADS]
    first = run * job[RUN_TOKENS]
    end = min(first + job[RUN_TOKENS], job[TOKENS])
    keys = _keys(job, head)
    values = job[VALUES] + sequence * job[VALUE_BATCH_BYTES] + kv_head * job[VALUE_HEAD_BYTES]
    key_nbytes, value_nbytes = job[KEY_WIDTH] * job[ELEMENT_BYTES], job[VALUE_TOKEN_BYTES]
    table = carray(int64_pointer(job[QUERIES]), ((head + 1) * group,))
    for row in range(group):
        _take_query(elements, table[head * group + row], job[KEY_WIDTH], queries[row : row + 1])
        state[row, 0], state[row, 1] = -np.inf, np.float32(0)
        sums[row] = np.float32(0)
    for token in range(first, end, _PART_TOKENS):
        tokens = min(_PART_TOKENS, end - token)
        here, there = keys + token * key_nbytes, values + token * value_nbytes
        _score(elements, plain, code, job, here, tokens, queries, scores, wide, there)
        _soften(job, tokens, scores, sums, state)
        after = here + tokens * key_nbytes if token + tokens < end else following
        _weigh(elements, code, job, there, tokens, scores, sums, wide, after)
    width = job[VALUE_WIDTH]
    address = job[PARTS] + 4 * (width + 2) * (head * group * job[RUNS] + run)
    parts = carray(float32_pointer(address), (group, job[RUNS], width + 2))
    for row in range(group):
        parts[row, 0, :width] = sums[row, :width]
        parts[row, 0, width], parts[row, 0, width + 1] = state[row, 0], state[row, 1]


@inner
def run_chunk(elements, plain, code, job_address, chunk):
    """Some runs, one after the other."""
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    group = job[GROUP]
    key_columns, value_columns = _whole_lanes(job[KEY_WIDTH]), _whole_lanes(job[VALUE_WIDTH])
    queries, sums = np.empty((group, key_columns), np.float32), np.empty((group, value_columns), np.float32)
    scores, state = np.empty((group, _PART_TOKENS), np.float32), np.empty((group, 2), np.float32)
    is_whole = key_columns == job[KEY_WIDTH] and value_columns == job[VALUE_WIDTH]
    wide = np.empty((0 if is_whole else _NEAR_TOKENS, max(key_columns, value_columns)), np.float32)
    first = chunk * job[CHUNK_RUNS]
    for number in range(first, min(first + job[CHUNK_RUNS], job[ALL_RUNS])):
        head, after = number // job[RUNS], (number + 1) // job[RUNS]
        run = number - head * job[RUNS]
        following = _keys(job, after)
        following += (number + 1 - after * job[RUNS]) * job[RUN_TOKENS] * job[KEY_WIDTH] * job[ELEMENT_BYTES]
        _run(elements, plain, code, job, head, run, following, queries, scores, sums, state, wide)


@inner
def _combine(elements, job_address, head):
    """A head's result from those of its runs."""
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    runs, width = job[RUNS], job[VALUE_WIDTH]
    parts = carray(float32_pointer(job[PARTS]), (head + 1, runs, width + 2))[head]
    largest = parts[0, width]
    for run in range(1, runs):
        largest = max(largest, parts[run, width])
    total = np.float32(0)
    if job[SINKS]:
        heads = job[KV_HEADS] * job[GROUP]
        sink = carray(float32_pointer(job[SINKS]), (heads,))[head % heads]
        largest = max(largest, sink)
        total = exp_float32(sink - largest)
    for run in range(runs):
        share = exp_float32(parts[run, width] - largest)
        total += share * parts[run, width + 1]
        for i in range(width):
            parts[run, i] *= share
    for run in range(1, runs):
        for i in range(width):
            parts[0, i] += parts[run, i]
    out = carray(element_pointer(elements, job[OUT] + head * width * job[ELEMENT_BYTES]), (width,))
    for i in range(width):
        out[i] = float32_to_element(elements, parts[0, i] / total)


@cache
def run_task(elements: Elements) -> int:
    """Address of the compiled task void(int64 job, int64 chunk) for these elements; compiled or loaded on first use."""
    code, plain = KvCode(elements.format), Elements(elements.format, "generic")

    def task(job: int, chunk: int) -> None:
        run_chunk(elements, plain, code, job, chunk)

    return task_address(task)


@cache
def combine_task(elements: Elements) -> int:
    """Address of the compiled task void(int64 job, int64 head) that ends the work."""

    def task(job: int, head: int) -> None:
        _combine(elements, job, head)

    return task_address(task)


_I64 = ", ".join(["int64"] * 24)


@entry(f"void({_I64}, float32)")
def run_decode_attention(
    launcher: int, state: int, threads: int, task: int, ending: int, element_bytes: int, batch: int, kv_heads: int,
    group: int,
    tokens: int, key_width: int, value_width: int, q: int, q_batch: int, q_head: int,
    k: int, k_batch: int, k_head: int, v: int, v_batch: int, v_head: int, v_token: int, out: int, sinks: int,
    scale: float,
) -> None:  # fmt: skip
    """Attend, all tensors given by their addresses and their strides in elements; out [batch, heads, value width].

    sinks: address of fp32 [query heads], 0 for none.
    """
    heads = batch * kv_heads * group
    run_tokens = (tokens + _MOST_RUNS * _PART_TOKENS - 1) // (_MOST_RUNS * _PART_TOKENS) * _PART_TOKENS
    runs = (tokens + run_tokens - 1) // run_tokens
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
    job[RUN_TOKENS] = run_tokens
    job[RUNS] = runs
    job[ALL_RUNS] = batch * kv_heads * runs
    job[CHUNK_RUNS] = max(1, job[ALL_RUNS] // (_CHUNKS_PER_THREAD * threads))
    job[KEY_WIDTH] = key_width
    job[VALUE_WIDTH] = value_width
    job[ELEMENT_BYTES] = element_bytes
    job[SCALE : SCALE + 1].view(np.float32)[0] = scale
    job[SINKS] = sinks
    job[PARTS] = job.ctypes.data + 8 * (JOB_FIELDS + heads)
    job[OUT] = out
    chunks = (job[ALL_RUNS] + job[CHUNK_RUNS] - 1) // job[CHUNK_RUNS]
    if batch * kv_heads * tokens * (key_width + value_width) <= _ONE_THREAD_ELEMENTS:
        run_inline(task, job, chunks)
    else:
        launch(launcher, state, task, job, chunks)
    if heads * runs * value_width <= _ONE_THREAD_ELEMENTS:
        run_inline(ending, job, heads)
    else:
        launch(launcher, state, ending, job, heads)
