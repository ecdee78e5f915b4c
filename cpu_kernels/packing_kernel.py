# mypy: allow-untyped-defs
"""Kernels of `pack_into`: a tile of 16 rows, or a stripe of 128, from row-major weights to codes and scales.

They do what `formats.pack` does, operation by operation, with a vector lane for each row of a tile.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from cpu_kernels.jit import carray, entry, inner, task_address
from cpu_kernels.packing_simd import (
    rows_add_square,
    rows_divide,
    rows_e2m1_code,
    rows_e4m3_code,
    rows_integer_code,
    rows_larger,
    rows_largest,
    rows_load,
    rows_multiply,
    rows_nearest_e2m1,
    rows_nearest_integer,
    rows_power_of_two,
    rows_round_to_bf16,
    rows_splat,
    rows_store,
    rows_store_bf16,
    rows_store_e8m0,
    rows_subtract_product,
    rows_where_less,
    rows_with_code,
)
from cpu_kernels.simd import (
    Elements,
    element_pointer,
    element_to_float32,
    elements_per_step,
    float32_pointer,
    int64_pointer,
)
from cpu_kernels.threads_kernel import call_task
from formats.packed import (
    BLOCK_ROWS,
    E4M3_MAX,
    INT4_DIVISORS,
    INT8_DIVISORS,
    LARGEST_MAGNITUDE,
    PACKED_FORMATS,
    SMALLEST_MAGNITUDE,
    STEP_BYTES,
    TILE_ROWS,
)

# Fields of a job, a table of int64.
SOURCE, ROW_BYTES, ROWS, COLUMNS, PADDED_COLUMNS, CODES, SCALES, REFUSED = range(8)
JOB_FIELDS = 8

_ONE = np.float32(1)
_LARGEST, _SMALLEST = np.float32(LARGEST_MAGNITUDE), np.float32(SMALLEST_MAGNITUDE)
_PER_E4M3_MAX = np.float32(1 / E4M3_MAX)
_INT8_SHARES = tuple(_ONE / np.float32(divisor) for divisor in INT8_DIVISORS)
_INT4_SHARES = tuple(_ONE / np.float32(divisor) for divisor in INT4_DIVISORS)
_LANE_BYTES = 4 * TILE_ROWS

_INT4_GROUP = PACKED_FORMATS["int4"].group
_INT8_GROUP = PACKED_FORMATS["int8"].group
_MXFP4_GROUP = PACKED_FORMATS["mxfp4"].group
_E4M3_BLOCK = PACKED_FORMATS["fp8_e4m3"].group


@inner
def _fetch(elements, job, first_row, first_column, count, buffer):
    """buffer[column, lane] = the weights of a tile as fp32; zero beyond the matrix."""
    rows = min(TILE_ROWS, job[ROWS] - first_row)
    columns = max(0, min(count, job[COLUMNS] - first_column))
    if rows < TILE_ROWS or columns < count:
        buffer[:count] = 0
    offset = first_column * (STEP_BYTES // elements_per_step(elements))
    for row in range(rows):
        source = carray(
            element_pointer(elements, job[SOURCE] + (first_row + row) * job[ROW_BYTES] + offset), (columns,)
        )
        for column in range(columns):
            buffer[column, row] = element_to_float32(elements, source[column])


@inner
def _extremes(weights, group):
    """Of each row the weight of largest magnitude, the first of equals, and that magnitude or NaN."""
    largest = rows_splat(np.float32(0))
    extreme = rows_splat(np.float32(0))
    for column in range(group):
        weight = rows_load(weights + _LANE_BYTES * column)
        larger = rows_larger(largest, weight)
        extreme = rows_where_less(largest, larger, weight, extreme)
        largest = larger
    return extreme, largest


@inner
def _integer_error(weights, group, scale, low, high):
    inverse = rows_divide(rows_splat(_ONE), scale)
    error = rows_splat(np.float32(0))
    for column in range(group):
        weight = rows_load(weights + _LANE_BYTES * column)
        value = rows_nearest_integer(rows_multiply(weight, inverse), low, high)
        error = rows_add_square(error, rows_subtract_product(weight, value, scale))
    return error


@inner
def _e2m1_error(weights, scale):
    inverse = rows_divide(rows_splat(_ONE), scale)
    error = rows_splat(np.float32(0))
    for column in range(_MXFP4_GROUP):
        weight = rows_load(weights + _LANE_BYTES * column)
        value = rows_nearest_e2m1(rows_multiply(weight, inverse))
        error = rows_add_square(error, rows_subtract_product(weight, value, scale))
    return error


@inner
def _live(extreme, largest):
    """The extremes, 1 in rows whose group becomes zero."""
    return rows_where_less(largest, rows_splat(_SMALLEST), rows_splat(_ONE), extreme)


@inner
def _settle(scale, largest):
    """The scales to store and their inverses; both zero in rows whose group becomes zero."""
    zero, smallest = rows_splat(np.float32(0)), rows_splat(_SMALLEST)
    inverse = rows_where_less(largest, smallest, zero, rows_divide(rows_splat(_ONE), scale))
    return rows_where_less(largest, smallest, zero, scale), inverse


@inner
def _search_integers(weights, group, numerator, shares, low, high):
    best = rows_round_to_bf16(rows_multiply(numerator, rows_splat(shares[0])))
    best_error = _integer_error(weights, group, best, low, high)
    for candidate in range(1, len(shares)):
        scale = rows_round_to_bf16(rows_multiply(numerator, rows_splat(shares[candidate])))
        error = _integer_error(weights, group, scale, low, high)
        best = rows_where_less(error, best_error, scale, best)
        best_error = rows_where_less(error, best_error, error, best_error)
    return best


@inner
def _int8_group(weights, codes, scales):
    """Pack one group of a tile; False if it is refused."""
    low, high = rows_splat(np.float32(-127)), rows_splat(np.float32(127))
    offset = rows_splat(np.float32(128))
    extreme, largest = _extremes(weights, _INT8_GROUP)
    if not rows_largest(largest) < _LARGEST:
        return False
    numerator = rows_larger(rows_splat(np.float32(0)), _live(extreme, largest))
    scale = _search_integers(weights, _INT8_GROUP, numerator, _INT8_SHARES, low, high)
    stored, inverse = _settle(scale, largest)
    rows_store_bf16(scales, stored)
    for step in range(_INT8_GROUP // 4):
        word = rows_splat(np.float32(0))
        for j in range(4):
            weight = rows_load(weights + _LANE_BYTES * (4 * step + j))
            value = rows_nearest_integer(rows_multiply(weight, inverse), low, high)
            word = rows_with_code(word, rows_integer_code(value, offset), 8 * j)
        rows_store(codes + STEP_BYTES * step, word)
    return True


@inner
def _int4_group(weights, codes, scales):
    low, high = rows_splat(np.float32(-8)), rows_splat(np.float32(7))
    offset = rows_splat(np.float32(8))
    extreme, largest = _extremes(weights, _INT4_GROUP)
    if not rows_largest(largest) < _LARGEST:
        return False
    scale = _search_integers(weights, _INT4_GROUP, _live(extreme, largest), _INT4_SHARES, low, high)
    stored, inverse = _settle(scale, largest)
    rows_store_bf16(scales, stored)
    for step in range(_INT4_GROUP // 8):
        word = rows_splat(np.float32(0))
        for j in range(8):
            weight = rows_load(weights + _LANE_BYTES * (8 * step + j))
            value = rows_nearest_integer(rows_multiply(weight, inverse), low, high)
            word = rows_with_code(word, rows_integer_code(value, offset), 8 * (j % 4) + 4 * (j // 4))
        rows_store(codes + STEP_BYTES * step, word)
    return True


@inner
def _mxfp4_group(weights, codes, scales):
    extreme, largest = _extremes(weights, _MXFP4_GROUP)
    if not rows_largest(largest) < _LARGEST:
        return False
    power = rows_power_of_two(_live(extreme, largest))
    small = rows_multiply(power, rows_splat(np.float32(0.25)))
    large = rows_multiply(power, rows_splat(np.float32(0.5)))
    scale = rows_where_less(_e2m1_error(weights, large), _e2m1_error(weights, small), large, small)
    stored, inverse = _settle(scale, largest)
    rows_store_e8m0(scales, rows_where_less(rows_splat(np.float32(0)), stored, stored, rows_splat(_ONE)))
    for step in range(_MXFP4_GROUP // 8):
        word = rows_splat(np.float32(0))
        for j in range(8):
            weight = rows_load(weights + _LANE_BYTES * (8 * step + j))
            code = rows_e2m1_code(rows_multiply(weight, inverse))
            word = rows_with_code(word, code, 8 * (j % 4) + 4 * (j // 4))
        rows_store(codes + STEP_BYTES * step, word)
    return True


def _tiles_of(pack_group: Any, format: str) -> Any:
    """The function void(elements, job, tile) that packs a tile group by group."""
    group, scale_nbytes = PACKED_FORMATS[format].group, PACKED_FORMATS[format].scale_nbytes
    group_nbytes = group * TILE_ROWS * PACKED_FORMATS[format].bits // 8

    @inner
    def pack_tile(elements, job_address, tile):
        job = carray(int64_pointer(job_address), (JOB_FIELDS,))
        groups = job[PADDED_COLUMNS] // group
        buffer = np.empty((group, TILE_ROWS), np.float32)
        codes = job[CODES] + tile * groups * group_nbytes
        scales = job[SCALES] + tile * groups * TILE_ROWS * scale_nbytes
        for index in range(groups):
            _fetch(elements, job, TILE_ROWS * tile, group * index, group, buffer)
            at = scales + TILE_ROWS * scale_nbytes * index
            if not pack_group(buffer.ctypes.data, codes + group_nbytes * index, at):
                job[REFUSED] = 1
                return

    return pack_tile


@inner
def _e4m3_stripe(elements, job_address, stripe):
    """A stripe of 128 rows, block by block."""
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    padded_columns = job[PADDED_COLUMNS]
    blocks = -(-job[COLUMNS] // _E4M3_BLOCK)
    first_row = BLOCK_ROWS * stripe
    tiles = -(-min(BLOCK_ROWS, job[ROWS] - first_row) // TILE_ROWS)
    buffer = np.empty((tiles, _E4M3_BLOCK, TILE_ROWS), np.float32)
    scales = carray(float32_pointer(job[SCALES] + 4 * stripe * blocks), (blocks,))
    for block in range(blocks):
        first_column = _E4M3_BLOCK * block
        count = min(_E4M3_BLOCK, padded_columns - first_column)
        all_largest = np.float32(0)
        for tile in range(tiles):
            _fetch(elements, job, first_row + TILE_ROWS * tile, first_column, count, buffer[tile])
            _, largest = _extremes(buffer[tile].ctypes.data, count)
            value = rows_largest(largest)
            if not value < _LARGEST:
                job[REFUSED] = 1
                return
            all_largest = max(all_largest, value)
        live = all_largest >= _SMALLEST
        scale = all_largest * _PER_E4M3_MAX if live else _ONE
        scales[block] = scale
        inverse = rows_splat(_ONE / scale if live else np.float32(0))
        for tile in range(tiles):
            weights = buffer[tile].ctypes.data
            row = first_row + TILE_ROWS * tile
            codes = job[CODES] + row * padded_columns + first_column * TILE_ROWS
            for step in range(count // 4):
                word = rows_splat(np.float32(0))
                for j in range(4):
                    weight = rows_load(weights + _LANE_BYTES * (4 * step + j))
                    word = rows_with_code(word, rows_e4m3_code(rows_multiply(weight, inverse)), 8 * j)
                rows_store(codes + STEP_BYTES * step, word)


_PACK_CHUNK = {
    "int8": _tiles_of(_int8_group, "int8"),
    "int4": _tiles_of(_int4_group, "int4"),
    "mxfp4": _tiles_of(_mxfp4_group, "mxfp4"),
    "fp8_e4m3": _e4m3_stripe,
}


@cache
def packing_task(elements: Elements, format: str) -> int:
    """Address of the compiled task void(int64 job, int64 chunk); compiled or loaded from the cache on first use.

    A chunk is a tile of 16 rows, in fp8_e4m3 a stripe of 128.

    Args:
        elements: of the source.
        format: a key of PACKED_FORMATS.
    """
    pack_chunk = _PACK_CHUNK[format]

    def task(job: int, chunk: int) -> None:
        pack_chunk(elements, job, chunk)

    # Numba finds a cached kernel by its name and by what it closes over, which for a function is not its code.
    task.__name__ = f"pack_{format}"
    task.__qualname__ = f"packing_task.{task.__name__}"
    return task_address(task)


@entry("void(int64, int64, int64)")
def run_chunks(task, job, chunks):
    """All chunks of a task, one after the other, on the calling thread."""
    for chunk in range(chunks):
        call_task(task, job, chunk)
