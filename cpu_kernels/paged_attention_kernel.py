# mypy: allow-untyped-defs, allow-untyped-calls
"""Kernel of `paged_attention`: a chunk is a run of blocks of one key-value head with up to 64 of its query rows.

A chunk goes through its blocks with an online softmax (Milakov and Gimelshein, 2018) and leaves the weighted sum of
values, the largest score and the sum of exponentials of each row; these are combined at the end in the order of
runs, as in flash decoding (Dao et al., 2023). How blocks are cut into runs depends on the problem and not on the
threads, so neither do the bits. Chunks of the same blocks may be a group that one thread goes through together.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from cpu_kernels import paged_attention_block as block
from cpu_kernels.activation_kernel import exp_float32
from cpu_kernels.cache_lines import ask_for
from cpu_kernels.jit import call_at, carray, inner, task_address
from cpu_kernels.kv_softmax import (
    add_exponentials,
    cap_row,
    exponentials_and_sum,
    hide,
    hide_invalid,
    largest_of_row,
    largest_so_far,
    scale_row_largest,
    sum_of_row,
)
from cpu_kernels.kv_whole_blocks import WHOLE_TOKENS, weigh_whole_row
from cpu_kernels.packed_tiles import int8_pointer
from cpu_kernels.paged_attention_block import (
    BLOCK_TOKENS,
    CODE_FACTOR,
    EXPAND_FUNCTION,
    FROM_KEY,
    GROUP,
    HAS_SCALES,
    HAS_TOKEN_SCALES,
    HEAD_NBYTES,
    KEY_COLUMNS,
    KEY_SCALES,
    KEY_WIDTH,
    KEYS,
    LAYOUT_FIELDS,
    OUTPUT_WIDTH,
    PART_NBYTES,
    QUERY_NBYTES,
    ROUNDS_WEIGHTS,
    VALUE_COLUMNS,
    VALUE_SCALES,
    VALUES,
)
from cpu_kernels.simd import float32_pointer, int64_pointer

(
    QUERIES,  # address of fp32 [B, Hk, T, group, query width]
    ADDRESSES,  # address of int64, of blocks
    CHUNKS,  # address of int64 [chunks][CHUNK_FIELDS]
    ENDS,  # address of int64 [rows' tiles][END_FIELDS]
    LENGTHS,
    FIRST_POSITIONS,
    QUERY_POSITIONS,  # address of int64 [B, T]
    POSITIONS,  # T
    KV_HEADS,
    WINDOW,
    VALID,  # address of bytes [sequences, ...], or 0
    VALID_STRIDE,  # bytes between its rows
    LIST_ROWS,  # address of int64 [B]: which row of queries and of VALID each list of blocks has; 0: its own
    LIST_PLACES,  # address of int64 [B]: where in OUT and LSE it writes to; 0: at its number
    SCALE,  # as its bits, like the next
    SOFTCAP,
    PARTS,  # address of rows of PART_NBYTES, fp32: weighted sum, ..., largest score, sum of exponentials
    OUT,
    LSE,
    FLOAT32_FUNCTION,  # address of `multiply_panels` of fp32
    DOT_FUNCTION,  # address of `dot_panels`, for latent attention
    THREADS,  # of the pool; it decides how many heads of a run go together
    GROUPS,  # address of int64 [groups][GROUP_FIELDS]
    JOB_FIELDS,
) = range(LAYOUT_FIELDS, LAYOUT_FIELDS + 24)

# A chunk: where it is, which of its sequence's blocks, and its first row's part.
(SEQUENCE, HEAD, FIRST_ROW, ROWS, FIRST_BLOCK, BLOCKS, FIRST_TOKEN, PART, CHUNK_FIELDS) = range(9)
# The end of a tile of rows: its first chunk and how many.
(END_CHUNK, END_CHUNKS, END_FIELDS) = range(3)
# Chunks of the same blocks that one thread goes through together: the first, how far apart their numbers are, how many.
(GROUP_CHUNK, GROUP_STRIDE, GROUP_CHUNKS, GROUP_FIELDS) = range(4)

TILE_ROWS = 64
# More rows than this read a block that was widened once.
IN_PLACE_ROWS = 8
_MINUS_INFINITY = np.float32(-np.inf)
_ZERO = np.float32(0)


@inner
def _told_of_list(address, number):
    """What a table of int64 says of a list of blocks; its number where there is no table."""
    return carray(int64_pointer(address + 8 * number), (1,))[0] if address else number


@inner
def _range_of_row(job, chunk, row, first_position, tokens):
    """The tokens of a block that a row sees: [low, high)."""
    index = chunk[SEQUENCE] * job[POSITIONS] + (chunk[FIRST_ROW] + row) // job[GROUP]
    position = carray(int64_pointer(job[QUERY_POSITIONS] + 8 * index), (1,))[0]
    low = max(position - job[WINDOW] + 1 - first_position, 0)
    high = min(position + 1 - first_position, tokens)
    return low, high


@inner
def _weigh_row(job, scores, lanes, low, high, valid, part):
    """Scores of a row turned into weights; the row's part is brought to their largest."""
    width = job[PART_NBYTES] // 4
    capped = block.float32_at(job.ctypes.data + 8 * SOFTCAP)
    largest = scale_row_largest(scores, block.float32_at(job.ctypes.data + 8 * SCALE), lanes)
    some_hidden = low > 0 or high < lanes
    if capped > _ZERO or some_hidden or job[VALID]:
        if capped > _ZERO:
            cap_row(scores, capped, lanes)
        hide(scores, low, high, lanes, _MINUS_INFINITY)
        if job[VALID]:
            hide_invalid(scores, low, high, valid, _MINUS_INFINITY)
        largest = largest_of_row(scores, lanes)
    if largest == _MINUS_INFINITY:
        hide(scores, 0, 0, lanes, _ZERO)
        return
    largest = largest_so_far(part, width, largest)
    total = exponentials_and_sum(scores, largest, lanes)
    if some_hidden or job[VALID]:
        hide(scores, low, high, lanes, _ZERO)
        if job[VALID]:
            hide_invalid(scores, low, high, valid, _ZERO)
        total = sum_of_row(scores, lanes)
    add_exponentials(part, width, largest, total)


@inner
def _weigh_rows(job, chunk, token, tokens, scores):
    """`_weigh_row` for all rows of a chunk; token: the number of the block's first in its sequence's list."""
    sequence = chunk[SEQUENCE]
    score_nbytes = 4 * job[BLOCK_TOKENS]
    first = carray(int64_pointer(job[FIRST_POSITIONS] + 8 * sequence), (1,))[0] + token
    mask_row = _told_of_list(job[LIST_ROWS], sequence)
    valid = carray(int8_pointer(job[VALID] + mask_row * job[VALID_STRIDE] + first), (tokens,))
    for row in range(chunk[ROWS]):
        low, high = _range_of_row(job, chunk, row, first, tokens)
        at = scores + row * score_nbytes
        if low >= high:
            hide(at, 0, 0, job[BLOCK_TOKENS], _ZERO)
        else:
            part = job[PARTS] + job[PART_NBYTES] * (chunk[PART] + row)
            _weigh_row(job, at, (tokens + 15) // 16 * 16, low, high, valid, part)


@inner
def _weigh_whole_rows(job, head, rows, scores, parts, scaled):
    """`_weigh_rows` of rows that see all of a block and whose scores have no cap.

    scaled: whether the block's scales, which 8-bit formats have, go to scores and weights.
    """
    scale = block.float32_at(job.ctypes.data + 8 * SCALE)
    factor = block.float32_at(job.ctypes.data + 8 * CODE_FACTOR)
    for row in range(rows):
        weigh_whole_row(scores + row * 4 * WHOLE_TOKENS, scale, scaled, head + job[KEY_SCALES],
                        head + job[VALUE_SCALES], factor, scaled and job[ROUNDS_WEIGHTS] != 0,
                        parts + row * job[PART_NBYTES], job[PART_NBYTES] // 4)  # fmt: skip


@inner
def _seen_by_all(job, chunk):
    """The tokens of a sequence's list that all rows of a chunk see whole blocks of: [low, high)."""
    if job[BLOCK_TOKENS] != WHOLE_TOKENS or block.float32_at(job.ctypes.data + 8 * SOFTCAP) > _ZERO:
        return 0, 0
    first = carray(int64_pointer(job[FIRST_POSITIONS] + 8 * chunk[SEQUENCE]), (1,))[0]
    length = carray(int64_pointer(job[LENGTHS] + 8 * chunk[SEQUENCE]), (1,))[0]
    low, high = 0, length
    for row in range(chunk[ROWS]):
        row_low, row_high = _range_of_row(job, chunk, row, first, length)
        low, high = max(low, row_low), min(high, row_high)
    if job[VALID]:
        low = max(low, _last_padding(job, chunk, first, high) + 1)
    return low, high


@inner
def _last_padding(job, chunk, first, high):
    """The last token of a chunk, before `high` of its list, that is padding; the one before the chunk for none."""
    mask_row = _told_of_list(job[LIST_ROWS], chunk[SEQUENCE])
    valid = carray(int8_pointer(job[VALID] + mask_row * job[VALID_STRIDE] + first), (high,))
    start = chunk[FIRST_TOKEN]
    token = min(start + chunk[BLOCKS] * job[BLOCK_TOKENS], high) - 1
    while token >= start and valid[token] != 0:
        token -= 1
    return token


@inner
def _products_with_keys(job, head, tokens, queries, rows, scores, scratch):
    """`key_products` of a head of a block, whose values are asked for meanwhile."""
    # Scales are needed before codes; what is not asked for is waited for.
    if job[HAS_SCALES]:
        ask_for(head + job[VALUE_SCALES], head + job[HEAD_NBYTES])
    block.key_products(job, head, tokens, queries, rows, scores, scratch, head + job[VALUES])


@inner
def _attend_in_place(job, chunks, stride, heads, addresses, length, queries, query_step, scores, scratch):
    """The blocks of few rows, head after head.

    A softmax is a chain of operations that wait for one another. In packed formats, where arithmetic takes about as
    long as memory, products with the next head's keys lie between it and the sums that need its weights, so that a
    core does both at once; others are read as they lie.
    """
    chunk = chunks[0]
    rows, block_tokens, units = chunk[ROWS], job[BLOCK_TOKENS], chunk[BLOCKS] * heads
    if units == 0:
        return
    low, high = _seen_by_all(job, chunk)
    early = job[HAS_SCALES] != 0
    heads_at = np.empty(units + 2, np.int64)
    for unit in range(units):
        heads_at[unit] = addresses[unit // heads] + (chunk[HEAD] + unit % heads) * job[HEAD_NBYTES]
    heads_at[units] = heads_at[units + 1] = heads_at[units - 1]
    token, place = chunk[FIRST_TOKEN], 0
    tokens, other = min(length - token, block_tokens), scores + 4 * rows * block_tokens
    _products_with_keys(job, heads_at[0], tokens, queries, rows, scores, scratch)
    for unit in range(units):
        head, part = heads_at[unit], job[PARTS] + job[PART_NBYTES] * chunks[place * stride, PART]
        if tokens == WHOLE_TOKENS and low <= token and token + tokens <= high:
            _weigh_whole_rows(job, head, rows, scores, part, job[HAS_TOKEN_SCALES] != 0)
        else:
            block.scale_scores(job, head, tokens, rows, scores)
            _weigh_rows(job, chunks[place * stride], token, tokens, scores)
            block.scale_weights(job, head, tokens, scores, rows)
        now, place = tokens, place + 1
        if place == heads:
            place, token = 0, token + block_tokens
            tokens = min(length - token, block_tokens)
        following, after = heads_at[unit + 1], heads_at[unit + 1]
        next_queries = queries + place * query_step
        if early:
            after = heads_at[unit + 2]
            if unit + 1 < units:
                _products_with_keys(job, following, tokens, next_queries, rows, other, scratch)
            ask_for(after + job[KEY_SCALES], after + job[VALUES])
        block.add_values(job, head, now, scores, rows, part, scratch, after + job[KEYS])
        if not early and unit + 1 < units:
            _products_with_keys(job, following, tokens, next_queries, rows, other, scratch)
        scores, other = other, scores


@inner
def _attend_expanded(job, chunk, head, token, tokens, whole, queries, scores, scratch):
    """A block's share of more rows, of a block widened to fp32 where it is not."""
    rows, score_nbytes, block_tokens, width = chunk[ROWS], 4 * job[BLOCK_TOKENS], job[BLOCK_TOKENS], job[KEY_WIDTH]
    keys, values = scratch + 512, scratch + 512 + 4 * job[KEY_COLUMNS] * block_tokens
    if job[EXPAND_FUNCTION]:
        call_at(job[EXPAND_FUNCTION], (job.ctypes.data, head, tokens, keys, values, scratch))
    else:
        keys, values = head + job[KEYS], head + job[VALUES]
    if job[FROM_KEY]:
        call_at(job[DOT_FUNCTION], (keys, 64 * block_tokens, (width + 15) // 16, (tokens + 3) // 4 * 4, queries,
                                    job[QUERY_NBYTES], rows, scores, score_nbytes))  # fmt: skip
        values = keys
    else:
        call_at(job[FLOAT32_FUNCTION], (keys, 64 * width, (tokens + 15) // 16, width, queries, job[QUERY_NBYTES],
                                         rows, scores, score_nbytes, 0, keys))  # fmt: skip
    out = job[PARTS] + job[PART_NBYTES] * chunk[PART]
    if whole:
        _weigh_whole_rows(job, head, rows, scores, out, False)
    else:
        _weigh_rows(job, chunk, token, tokens, scores)
    call_at(job[FLOAT32_FUNCTION], (values, 64 * block_tokens, (job[OUTPUT_WIDTH] + 15) // 16, tokens, scores,
                                     score_nbytes, rows, out, job[PART_NBYTES], 1, values))  # fmt: skip


@inner
def _run_group(job_address, number):
    """The chunks of a group, block after block and head after head, as they lie."""
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    group = carray(int64_pointer(job[GROUPS] + 8 * GROUP_FIELDS * number), (GROUP_FIELDS,))
    heads, stride = group[GROUP_CHUNKS], group[GROUP_STRIDE]
    chunks = carray(
        int64_pointer(job[CHUNKS] + 8 * CHUNK_FIELDS * group[GROUP_CHUNK]), ((heads - 1) * stride + 1, CHUNK_FIELDS)
    )
    chunk = chunks[0]
    rows, block_tokens, width = chunk[ROWS], job[BLOCK_TOKENS], job[PART_NBYTES] // 4
    for index in range(heads):
        parts = carray(float32_pointer(job[PARTS] + 4 * width * chunks[index * stride, PART]), (rows, width))
        parts[:] = _ZERO
        parts[:, width - 2] = _MINUS_INFINITY
    in_place = (rows <= IN_PLACE_ROWS or not job[EXPAND_FUNCTION]) and not job[FROM_KEY]
    if in_place:
        extra = ((heads + 1) * rows + 2) * max(job[QUERY_NBYTES] // 4, block_tokens)
    else:
        extra = 128 + (job[KEY_COLUMNS] + job[VALUE_COLUMNS]) * block_tokens
    memory = np.empty((2 * rows + 1) * block_tokens + extra + 16, np.float32)
    scores = (memory.ctypes.data + 63) // 64 * 64
    scratch = scores + 4 * (2 * rows + 1) * block_tokens
    query_row = _told_of_list(job[LIST_ROWS], chunk[SEQUENCE])
    head_row = (query_row * job[KV_HEADS] + chunk[HEAD]) * job[POSITIONS] * job[GROUP]
    queries, query_step = job[QUERIES] + (head_row + chunk[FIRST_ROW]) * job[QUERY_NBYTES], rows * job[QUERY_NBYTES]
    if in_place:
        # Rows of consecutive heads follow each other where chunks have all rows of a head, as those of a group do.
        queries = block.ready_queries(job, queries, heads * rows, scratch)
        scratch += heads * query_step
    length = carray(int64_pointer(job[LENGTHS] + 8 * chunk[SEQUENCE]), (1,))[0]
    addresses = carray(int64_pointer(job[ADDRESSES] + 8 * chunk[FIRST_BLOCK]), (chunk[BLOCKS],))
    if in_place:
        _attend_in_place(job, chunks, stride, heads, addresses, length, queries, query_step, scores, scratch)
    else:
        low, high = _seen_by_all(job, chunk)
        for index in range(chunk[BLOCKS]):
            token = chunk[FIRST_TOKEN] + index * block_tokens
            tokens = min(length - token, block_tokens)
            whole = tokens == WHOLE_TOKENS and low <= token and token + tokens <= high
            for place in range(heads):
                head = addresses[index] + (chunk[HEAD] + place) * job[HEAD_NBYTES]
                _attend_expanded(job, chunks[place * stride], head, token, tokens, whole, queries, scores,
                                 scratch)  # fmt: skip
    _keep(memory)


@inner
def _keep(memory):
    # An array is freed after its last use; its memory is used by address until here.
    return memory[0]


@inner
def _combine_tile(job_address, number):
    """The rows of one tile from their runs, in order."""
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    end = carray(int64_pointer(job[ENDS] + 8 * END_FIELDS * number), (END_FIELDS,))
    runs = end[END_CHUNKS]
    chunks = carray(int64_pointer(job[CHUNKS] + 8 * CHUNK_FIELDS * end[END_CHUNK]), (runs, CHUNK_FIELDS))
    width, columns = job[PART_NBYTES] // 4, job[OUTPUT_WIDTH]
    group, positions = job[GROUP], job[POSITIONS]
    first_head = (_told_of_list(job[LIST_PLACES], chunks[0, SEQUENCE]) * job[KV_HEADS] + chunks[0, HEAD]) * group
    for row in range(chunks[0, ROWS]):
        place = chunks[0, FIRST_ROW] + row
        query_head = first_head + place % group
        index = query_head * positions + place // group
        out = carray(float32_pointer(job[OUT] + 4 * columns * index), (columns,))
        largest = _MINUS_INFINITY
        for run in range(runs):
            largest = max(largest, block.float32_at(job[PARTS] + 4 * (width * (chunks[run, PART] + row + 1) - 2)))
        total = _ZERO
        out[:] = _ZERO
        for run in range(runs):
            part = carray(float32_pointer(job[PARTS] + 4 * width * (chunks[run, PART] + row)), (width,))
            if part[width - 1] != _ZERO:
                share = exp_float32(part[width - 2] - largest)
                total += share * part[width - 1]
                for i in range(columns):
                    out[i] += share * part[i]
        lse = carray(float32_pointer(job[LSE] + 4 * index), (1,))
        if total == _ZERO:
            lse[0] = _MINUS_INFINITY
        else:
            lse[0] = largest + np.log(total)
            inverse = np.float32(1) / total
            for i in range(columns):
                out[i] *= inverse


@cache
def attention_task() -> int:
    """Address of the compiled task void(int64 job, int64 group)."""

    def task(job: int, group: int) -> None:
        _run_group(job, group)

    return task_address(task)


@cache
def combine_task() -> int:
    """Address of the compiled task void(int64 job, int64 tile) that ends the work."""

    def task(job: int, tile: int) -> None:
        _combine_tile(job, tile)

    return task_address(task)
