# mypy: allow-untyped-defs
"""Kernels of sketches of keys: making one, and estimates of the largest score of each block's tokens."""

from __future__ import annotations

from functools import cache

import numpy as np

from cpu_kernels.jit import carray, entry, inner, task_address
from cpu_kernels.key_sketch_simd import (
    LARGEST_LOOKED_UP,
    TABLES_NBYTES,
    SumsShape,
    largest_deviation,
    rows_add_product,
    sizes_of_fours,
    sums_add,
    sums_store,
    sums_zero,
    write_tables,
)
from cpu_kernels.kv_softmax import rows_max, rows_maximum, rows_store, rows_sum
from cpu_kernels.packing_simd import rows_splat
from cpu_kernels.paged_attention_block import rows_from_bf16
from cpu_kernels.simd import Elements, element_to_float32, float32_pointer, float32_to_element, int64_pointer
from formats.key_sketch import SKETCH_CHANNELS, SKETCH_TOKENS

(
    QUERIES,  # fp32 [heads][rows][columns], zero after a key's width
    ROWS,
    COLUMNS,
    SKETCHES,
    HEAD_STRIDE,  # bytes between the sketches of two heads
    NBYTES,  # of a sketch
    RUNS,
    RUN_NBYTES,
    OUT,  # fp32 [heads][blocks]
    BLOCKS,
    PLACES,  # of `table_places`
    CHUNK_BLOCKS,
    HEAD_CHUNKS,
    SCRATCH,  # of each chunk SCRATCH_NBYTES
    SCRATCH_NBYTES,
    JOB_FIELDS,
) = range(16)

_SIGNS_NBYTES = SKETCH_CHANNELS * SKETCH_TOKENS // 8  # of a panel
_FACTORS_NBYTES = 2 * SKETCH_TOKENS
_SUMS_NBYTES = 2 * SKETCH_TOKENS
# Rows whose tables there are at a time, and what is known of each, fp32: its score at the middles, what a unit of the
# sums stands for, and the sum of all weights' magnitudes in these units.
_TILE_ROWS = 8
_MIDDLE, _UNIT, _TOTAL, _NUMBERS = range(4)
_NUMBERS_NBYTES = 128
_BF16 = Elements("bf16", "generic")
_ZERO, _HALF = np.float32(0), np.float32(0.5)
# Weights whose largest four are below count as zeros; the inverse need not be finite.
_SMALLEST = np.float32(1e-30)


# --- estimates ---


def scratch_nbytes(columns: int) -> int:
    """Of a chunk: a block's middles and spreads in fp32, a tile's tables, sums of two of its rows, numbers of all."""
    tables_nbytes = _TILE_ROWS * columns // SKETCH_CHANNELS * TABLES_NBYTES
    return 8 * columns + tables_nbytes + 2 * _SUMS_NBYTES + _NUMBERS_NBYTES


@inner
def _size_row(query, middles, columns, row):
    """Of a row, given by its address, the score at a block's middles and the largest sum of four magnitudes."""
    middle, size = rows_splat(_ZERO), rows_splat(_ZERO)
    for column in range(0, 4 * columns, 64):
        middle = rows_add_product(middle, query + column, middles + column)
    for column in range(0, 4 * columns, 4 * SKETCH_CHANNELS):
        size = rows_max(size, sizes_of_fours(query + column, middles + 4 * columns + column))
    row[_MIDDLE], row[_UNIT] = rows_sum(middle), rows_maximum(size)


@inner
def _write_row(shape, query, spreads, columns, places, row, tables):
    """A row's tables."""
    # Four roundings may add 2, and all that is looked up must fit 16 bits.
    limit = np.float32(min(LARGEST_LOOKED_UP, 65535 // (columns // 4)) - 2)
    largest = row[_UNIT]
    factor = limit / largest if largest > _SMALLEST else _ZERO
    total = _ZERO
    for column in range(0, 4 * columns, 4 * SKETCH_CHANNELS):
        at = tables + column // (4 * SKETCH_CHANNELS) * TABLES_NBYTES
        total += write_tables(shape, query + column, spreads + column, factor, places, at)
    row[_UNIT], row[_TOTAL] = largest / limit, total


@inner
def _largest_of_run(shape, run, panels, numbers, row, tables, sums_at, rows):
    """The largest estimate over some rows of a tile, from `row` on, and 64 tokens, whose factors are at `run`."""
    tables_nbytes = panels * TABLES_NBYTES
    sums = sums_zero(shape)
    for panel in range(panels):
        signs = run + _FACTORS_NBYTES + panel * _SIGNS_NBYTES
        sums = sums_add(shape, sums, signs, tables + row * tables_nbytes + panel * TABLES_NBYTES, tables_nbytes)
    sums_store(sums, sums_at)
    best = np.float32(-np.inf)
    for number in range(rows):
        own = numbers[row + number]
        deviation = rows_maximum(largest_deviation(sums_at + number * _SUMS_NBYTES, own[_TOTAL], run))
        score = own[_MIDDLE] + own[_UNIT] * deviation
        # So that a NaN is kept.
        best = best if best >= score else score
    return best


@inner
def _largest_of_tile(one, two, job, queries, rows, sketch, scratch):
    """The largest estimate of a block's scores over a few rows; its middles and spreads are at `scratch`."""
    columns = job[COLUMNS]
    panels = columns // SKETCH_CHANNELS
    tables = scratch + 8 * columns
    sums_at = tables + _TILE_ROWS * panels * TABLES_NBYTES
    numbers = carray(float32_pointer(sums_at + 2 * _SUMS_NBYTES), (_TILE_ROWS, _NUMBERS))
    for row in range(rows):
        _size_row(queries + 4 * row * columns, scratch, columns, numbers[row])
    for row in range(rows):
        at = tables + row * panels * TABLES_NBYTES
        _write_row(two, queries + 4 * row * columns, scratch + 4 * columns, columns, job[PLACES], numbers[row], at)
    best = np.float32(-np.inf)
    for number in range(job[RUNS]):
        run = sketch + 4 * columns + number * job[RUN_NBYTES]
        for row in range(0, rows - 1, 2):
            score = _largest_of_run(two, run, panels, numbers, row, tables, sums_at, 2)
            best = best if best >= score else score
        if rows % 2:
            score = _largest_of_run(one, run, panels, numbers, rows - 1, tables, sums_at, 1)
            best = best if best >= score else score
    return best


@inner
def run_chunk(one, two, job_address, chunk):
    """Some blocks of one head."""
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    head, first = chunk // job[HEAD_CHUNKS], chunk % job[HEAD_CHUNKS] * job[CHUNK_BLOCKS]
    rows, columns = job[ROWS], job[COLUMNS]
    queries = job[QUERIES] + 4 * head * rows * columns
    out = carray(float32_pointer(job[OUT] + 4 * head * job[BLOCKS]), (job[BLOCKS],))
    scratch = job[SCRATCH] + chunk * job[SCRATCH_NBYTES]
    for block in range(first, min(first + job[CHUNK_BLOCKS], job[BLOCKS])):
        sketch = job[SKETCHES] + head * job[HEAD_STRIDE] + block * job[NBYTES]
        for column in range(0, 2 * columns, 16):
            rows_store(scratch + 4 * column, rows_from_bf16(sketch + 2 * column))
        best = np.float32(-np.inf)
        for row in range(0, rows, _TILE_ROWS):
            some = min(_TILE_ROWS, rows - row)
            score = _largest_of_tile(one, two, job, queries + 4 * row * columns, some, sketch, scratch)
            best = best if best >= score else score
        out[block] = best


@cache
def scores_task(one: SumsShape, two: SumsShape) -> int:
    """Address of the compiled task void(int64 job, int64 chunk); compiled or loaded on first use."""

    def task(job: int, chunk: int) -> None:
        run_chunk(one, two, job, chunk)

    return task_address(task)


# --- making them ---


@inner
def _rounded(value):
    return element_to_float32(_BF16, float32_to_element(_BF16, value))


@inner
def _write_signs(plus, out):
    """The signs of 64 tokens; plus: [64, columns]."""
    place = 0
    for panel in range(0, plus.shape[1], SKETCH_CHANNELS):
        for pair in range(8):
            for own in range(2):
                first = panel + pair + 8 * own
                for j in range(32):
                    byte = 0
                    for four in range(4):
                        byte |= plus[j, first + 16 * four] << four | plus[32 + j, first + 16 * four] << (four + 4)
                    out[place] = byte
                    place += 1


@entry("void(float32[:, :, ::1], uint8[:, ::1], uint16[:, ::1], int64)")
def make_sketches(keys, sketches, words, columns):
    """Sketches of the blocks of some heads, see `formats.key_sketch`.

    keys: [heads, block_tokens, width]. sketches: zeros [heads, nbytes]; words: the same memory. columns: of a sketch.
    """
    heads, tokens, width = keys.shape
    runs = (tokens + SKETCH_TOKENS - 1) // SKETCH_TOKENS
    run_nbytes = _FACTORS_NBYTES + SKETCH_TOKENS * columns // 8
    lowest, highest, sums = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    plus = np.zeros((SKETCH_TOKENS, columns), np.uint8)
    for head in range(heads):
        own = keys[head]
        lowest[:], highest[:], sums[:] = own[0], own[0], _ZERO
        for t in range(1, tokens):
            for c in range(width):
                lowest[c] = min(lowest[c], own[t, c])
                highest[c] = max(highest[c], own[t, c])
        # From here on `lowest` holds middles and `highest` spreads.
        for c in range(width):
            lowest[c] = _rounded((lowest[c] + highest[c]) * _HALF)
        for t in range(tokens):
            for c in range(width):
                sums[c] += abs(own[t, c] - lowest[c])
        squares = 0.0
        for c in range(width):
            highest[c] = _rounded(sums[c] / np.float32(tokens))
            squares += float(highest[c]) * float(highest[c])
            words[head, c] = float32_to_element(_BF16, lowest[c])
            words[head, columns + c] = float32_to_element(_BF16, highest[c])
        for run in range(runs):
            start = 4 * columns + run * run_nbytes
            for place in range(SKETCH_TOKENS):
                t = min(run * SKETCH_TOKENS + place, tokens - 1)
                dot = 0.0
                for c in range(width):
                    away = own[t, c] - lowest[c]
                    plus[place, c] = away > _ZERO
                    dot += float(abs(away) * highest[c])
                at = start // 2 + place // 32 * 32 + place % 2 * 16 + place % 32 // 2
                words[head, at] = float32_to_element(_BF16, np.float32(dot / squares if squares > 0 else 0.0))
            _write_signs(plus, sketches[head, start + _FACTORS_NBYTES : start + run_nbytes])
