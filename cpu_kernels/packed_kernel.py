# mypy: allow-untyped-defs
"""Kernel of packed matrices: row tiles of one or two matrices times the quantised activations of some pairs.

A chunk is a range of row tiles of one expert; a linear layer is one expert. Where chunks cost about the same, threads
take `chunk_runs`. Weights are fetched from memory once: all
tokens pass a tile of 16 rows while its codes lie in the caches, and no more tokens than whose activations fit as well.
"""

from __future__ import annotations

from functools import cache

from cpu_kernels.activation_kernel import gated_row, plain_row
from cpu_kernels.activation_quantisation_kernel import BF16, FP16, FP32, block_nbytes, quantise_block
from cpu_kernels.chunk_runs import chunks_of_run
from cpu_kernels.jit import carray, inner, task_address
from cpu_kernels.packed_simd import PackedCode
from cpu_kernels.packed_tiles import (
    Tokens,
    activation_kind,
    block_scaled,
    codes_nbytes,
    most_tokens,
    packed_block,
    packed_store,
    packed_widen,
    packed_zero,
    prefetch_codes,
    scales_nbytes,
    tile_keep,
    tile_load,
    widened_block,
    widened_nbytes,
    widened_scratch,
)
from cpu_kernels.simd import element_pointer, float32_pointer, float32_to_element, int64_pointer
from formats.packed import BLOCK_ROWS, COLUMN_BLOCK, TILE_ROWS

# Fields of a job. Tables of rows hold an int64 address for every pair.
(
    EXPERTS,  # address of a table [n, 3] of int64: address that the next offsets count from, first pair, end of pairs
    CHUNKS,  # of all experts
    RUN_THREADS,  # threads that share `chunk_runs`; 0: chunks are taken one at a time
    CHUNKS_PER_EXPERT,
    TILES_PER_CHUNK,
    ROWS,  # of one matrix
    BLOCKS,  # blocks of 64 columns
    MATRICES,  # 2: gate and up, 1: any
    CODES,
    CODES_STRIDE,  # bytes from the first matrix to the second
    SCALES,
    SCALES_STRIDE,
    BIAS,  # of fp32; 0 where there is none
    BIAS_STRIDE,
    INPUT_ROWS,  # blocks of activations
    SUM_ROWS,  # fp32, the first matrix's rows, then the second's, then room for the activation
    OUTPUT_ROWS,
    OUTPUT,  # what is put out: SUMS (as they are), HIDDEN, or a number above
    ACTIVATION,
    JOB_FIELDS,
) = range(20)

SUMS, HIDDEN, OUT_BF16, OUT_FP16 = range(4)
OUTPUT_NUMBERS = {"fp32": SUMS, "bf16": OUT_BF16, "fp16": OUT_FP16}

TILES_PER_BLOCK = COLUMN_BLOCK // TILE_ROWS
_TILES_PER_SCALE = BLOCK_ROWS // TILE_ROWS

# Tokens whose activations pass a chunk's tiles one tile after the other: they should stay in the second-level cache.
_TOKENS_TOGETHER = 64

# Blocks of fp8 that are widened at a time, about half of a first-level cache, and for how many tokens at least.
_WIDENED_BLOCKS = 4
_WIDENED_FROM = 8

_ONE, _TWO, _FOUR, _EIGHT = Tokens(1), Tokens(2), Tokens(4), Tokens(8)
_WIDENED, _TOGETHER = Tokens(_WIDENED_BLOCKS), Tokens(_TOKENS_TOGETHER)


@inner
def _columns(code, count, codes, scales, blocks, inputs, sums, offset, rows):
    """One row tile times count.count tokens."""
    tile = packed_zero(count)
    nbytes = codes_nbytes(code)
    for block in range(blocks):
        prefetch_codes(code, count, codes + block * nbytes)
        tile = packed_block(code, tile, codes, scales, inputs, block)
    packed_store(code, tile, sums, offset, rows)


@inner
def _tile(code, codes, scales, blocks, inputs, sums, offset, rows, tokens):
    """One row tile times all tokens of a table."""
    token = 0
    if most_tokens(code) == 8:
        while tokens - token >= 8:
            _columns(code, _EIGHT, codes, scales, blocks, inputs + 8 * token, sums + 8 * token, offset, rows)
            token += 8
    while tokens - token >= 4:
        _columns(code, _FOUR, codes, scales, blocks, inputs + 8 * token, sums + 8 * token, offset, rows)
        token += 4
    if tokens - token >= 2:
        _columns(code, _TWO, codes, scales, blocks, inputs + 8 * token, sums + 8 * token, offset, rows)
        token += 2
    if tokens > token:
        _columns(code, _ONE, codes, scales, blocks, inputs + 8 * token, sums + 8 * token, offset, rows)


@inner
def _widened_columns(code, count, widened, first, blocks, inputs, kept, sums, offset, rows, last):
    """Some widened blocks of one row tile times count.count tokens; sums so far are kept between calls."""
    tile = tile_load(count, kept) if first > 0 else packed_zero(count)
    for block in range(blocks):
        tile = widened_block(code, tile, widened + block * widened_nbytes(code), inputs, first + block)
    if last:
        packed_store(code, tile, sums, offset, rows)
    else:
        tile_keep(tile, kept)


@inner
def _widened_tile(code, codes, scales, blocks, inputs, sums, offset, rows, tokens):
    """As `_tile`, for many tokens: blocks are widened once for all, as many at a time as stay in the nearest cache."""
    widened = widened_scratch(code, _WIDENED, _TOGETHER)
    kept = widened + _WIDENED_BLOCKS * widened_nbytes(code)
    for first in range(0, blocks, _WIDENED_BLOCKS):
        count = min(_WIDENED_BLOCKS, blocks - first)
        last = first + count == blocks
        for block in range(count):
            prefetch_codes(code, _FOUR, codes + (first + block) * codes_nbytes(code))
            packed_widen(code, codes, scales, widened + block * widened_nbytes(code), first + block)
        for token in range(0, tokens - 3, 4):
            x, out, keep = inputs + 8 * token, sums + 8 * token, kept + 4 * TILE_ROWS * token
            _widened_columns(code, _FOUR, widened, first, count, x, keep, out, offset, rows, last)
        for token in range(tokens // 4 * 4, tokens):
            x, out, keep = inputs + 8 * token, sums + 8 * token, kept + 4 * TILE_ROWS * token
            _widened_columns(code, _ONE, widened, first, count, x, keep, out, offset, rows, last)


@inner
def _add_bias(bias_address, sums_address, count):
    bias = carray(float32_pointer(bias_address), (count,))
    sums = carray(float32_pointer(sums_address), (count,))
    for i in range(count):
        sums[i] += bias[i]


@inner
def _round_row(elements, sums_address, out_address, count):
    sums = carray(float32_pointer(sums_address), (count,))
    out = carray(element_pointer(elements, out_address), (count,))
    for i in range(count):
        out[i] = float32_to_element(elements, sums[i])


@inner
def _put_out(code, with_fp16, job, sums, output, first, count):
    """Finish rows first to first + count of one pair, whose sums and biases are complete."""
    here = sums + 4 * first
    if job[OUTPUT] == OUT_BF16:
        _round_row(BF16, here, output + 2 * first, count)
    elif job[OUTPUT] == OUT_FP16:
        if with_fp16:
            _round_row(FP16, here, output + 2 * first, count)
    elif job[OUTPUT] == HIDDEN:
        hidden = here + 4 * job[ROWS] * job[MATRICES]
        if job[MATRICES] == 2:
            gated_row(FP32, job[ACTIVATION], here, here + 4 * job[ROWS], hidden, count)
        else:
            plain_row(FP32, job[ACTIVATION], here, hidden, count)
        kind = activation_kind(code)
        for start in range(0, count, COLUMN_BLOCK):
            block = output + (first + start) // COLUMN_BLOCK * block_nbytes(kind)
            quantise_block(kind, FP32, hidden + 4 * start, min(COLUMN_BLOCK, count - start), block)


@inner
def _run_chunk(code, with_fp16, job, chunk):
    """Some row tiles of one expert times its tokens: dot products, biases and what follows from them."""
    expert = chunk // job[CHUNKS_PER_EXPERT]
    first_tile = (chunk - expert * job[CHUNKS_PER_EXPERT]) * job[TILES_PER_CHUNK]
    first = first_tile * TILE_ROWS
    count = min(job[TILES_PER_CHUNK] * TILE_ROWS, job[ROWS] - first)
    entry = carray(int64_pointer(job[EXPERTS] + 24 * expert), (3,))
    base, pair, end = entry[0], entry[1], entry[2]
    blocks = job[BLOCKS]
    while pair < end:
        tokens = min(_TOKENS_TOGETHER, end - pair)
        inputs, sums = job[INPUT_ROWS] + 8 * pair, job[SUM_ROWS] + 8 * pair
        for matrix in range(job[MATRICES]):
            codes = base + job[CODES] + matrix * job[CODES_STRIDE]
            scales = base + job[SCALES] + matrix * job[SCALES_STRIDE]
            for start in range(0, count, TILE_ROWS):
                tile = first_tile + start // TILE_ROWS
                rows = min(TILE_ROWS, count - start)
                if block_scaled(code):
                    scales_of_tile = scales + 4 * (tile // _TILES_PER_SCALE) * ((blocks + 1) // 2)
                else:
                    scales_of_tile = scales + tile * blocks * scales_nbytes(code)
                offset = 4 * (matrix * job[ROWS] + first + start)
                codes_of_tile = codes + tile * blocks * codes_nbytes(code)
                if widened_nbytes(code) > 0 and tokens >= _WIDENED_FROM:
                    _widened_tile(code, codes_of_tile, scales_of_tile, blocks, inputs, sums, offset, rows, tokens)
                else:
                    _tile(code, codes_of_tile, scales_of_tile, blocks, inputs, sums, offset, rows, tokens)
        sum_rows = carray(int64_pointer(sums), (tokens,))
        output_rows = carray(int64_pointer(job[OUTPUT_ROWS] + 8 * pair), (tokens,))
        for token in range(tokens):
            if job[BIAS] > 0:
                for matrix in range(job[MATRICES]):
                    bias = base + job[BIAS] + matrix * job[BIAS_STRIDE] + 4 * first
                    _add_bias(bias, sum_rows[token] + 4 * (matrix * job[ROWS] + first), count)
            if job[OUTPUT] != SUMS:
                _put_out(code, with_fp16, job, sum_rows[token], output_rows[token], first, count)
        pair += tokens


@inner
def _run(code, with_fp16, job_address, run):
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    first, end = chunks_of_run(run, job[CHUNKS], job[RUN_THREADS])
    for chunk in range(first, end):
        _run_chunk(code, with_fp16, job, chunk)


@cache
def packed_task(code: PackedCode, with_fp16: bool) -> int:
    """Address of the compiled task void(int64 job, int64 run) for a format; compiled or loaded on first use."""

    def task(job: int, run: int) -> None:
        _run(code, with_fp16, job, run)

    return task_address(task)
