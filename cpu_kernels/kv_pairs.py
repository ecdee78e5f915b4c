# mypy: allow-untyped-defs, allow-untyped-calls
"""Weighted sums of the rows of panels of int8 and int4 in integers, for a few heads, whose weights are rounded first.

A head's weights are rounded to 16 bits: the error of each is at most 1 / 65,534 of the largest, where rounding to int8
cost 1 / 254. Rounded weights lie as int16 at the start of their row, its scale, fp32, in its last 4 bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from cpu_kernels.cache_lines import ask_for_line
from cpu_kernels.jit import carray, inner, intrinsic
from cpu_kernels.kv_pairs_simd import PairShape, pairs_add_rows, pairs_store, pairs_zero, store_rounded
from cpu_kernels.kv_simd import has_many_registers
from cpu_kernels.packing_simd import rows_larger, rows_largest, rows_load, rows_splat
from cpu_kernels.simd import float32_pointer

# Heads by panels. Eight sums of 8 lanes or more, because a multiplication that adds (VPDPWSSD) takes four cycles, and
# two start in each.
_EIGHT_BY_WIDE, _FOUR_BY_WIDE = PairShape("int8", 8, 1, lanes=16), PairShape("int8", 4, 1, chains=2, lanes=16)
_FOUR_BY_ONE = PairShape("int8", 4, 2)
_TWO_BY_ONE, _ONE_BY_ONE = PairShape("int8", 2, 2, chains=2), PairShape("int8", 1, 2, chains=4)
# int4: heads by nibbles of a half panel.
_FOUR_BY_HALF, _FOUR_BY_LOW, _FOUR_BY_HIGH = (
    PairShape("int4", 4, 4),
    PairShape("int4", 4, 2),
    PairShape("int4", 4, 2, 2),
)
_TWO_BY_HALF, _ONE_BY_HALF = PairShape("int4", 2, 4), PairShape("int4", 1, 4, chains=2)

_MOST_INT32, _MOST_INT16 = 2**31 - 1, 32767
# Of a lane before it is multiplied: int8, and a nibble that masking leaves where it stands.
_LARGEST_CODE = 240
_ZERO = np.float32(0)
# Weights whose largest is below count as zeros; their inverse need not be finite.
_SMALLEST = np.float32(1e-30)


@intrinsic
def _pair_nbytes(typingctx: Any, shape: Any) -> Any:
    """Bytes of a pair of rows of a panel, as a constant."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(64), shape.shape.pair_nbytes)

    return types.int64(shape), codegen


@inner
def largest_rounded(count):
    """What the largest of so many weights becomes: of many fewer bits are kept, so that sums fit 32 bits."""
    return np.float32(min(_MOST_INT16, _MOST_INT32 // (_LARGEST_CODE * max(count, 1))))


@inner
def _rounding(limit, largest):
    """What weights are multiplied with before they are rounded; `largest` of them becomes `limit`."""
    return limit / largest if largest > _SMALLEST else _ZERO


@inner
def _store_scale(out, nbytes, limit, largest):
    carray(float32_pointer(out + nbytes - 4), (1,))[0] = largest / limit + (largest - largest)


@inner
def round_row(row, count, limit, largest, out, nbytes):
    """Weights of one head rounded; a NaN or an infinity makes the scale NaN.

    row: address of fp32 [count], zero up to a multiple of 16. limit: `largest_rounded`. largest: of the magnitudes.
    out: address of `nbytes` bytes, which may be row's.
    """
    factor = _rounding(limit, largest)
    for i in range(0, 4 * count, 64):
        store_rounded(out + i // 2, rows_load(row + i), factor)
    _store_scale(out, nbytes, limit, largest)


@inner
def store_rounded_four(rows, out, nbytes):
    """`round_row` of 64 weights in four vectors."""
    a, b, c, d = rows
    limit = largest_rounded(64)
    largest = rows_largest(rows_larger(rows_larger(rows_larger(rows_larger(rows_splat(_ZERO), a), b), c), d))
    factor = _rounding(limit, largest)
    store_rounded(out, a, factor)
    store_rounded(out + 32, b, factor)
    store_rounded(out + 64, c, factor)
    store_rounded(out + 96, d, factor)
    _store_scale(out, nbytes, limit, largest)


@inner
def round_rows(rows, count, heads, out, nbytes):
    """`round_row` for `heads` rows, `nbytes` apart at the address `rows` as at `out`."""
    limit = largest_rounded(count)
    for head in range(heads):
        row = rows + head * nbytes
        largest = rows_splat(_ZERO)
        for i in range(0, 4 * count, 64):
            largest = rows_larger(largest, rows_load(row + i))
        round_row(row, count, limit, rows_largest(largest), out + head * nbytes, nbytes)


@inner
def _tile(shape, panel, panel_nbytes, rows, weights, nbytes, out, out_nbytes, add, ahead):
    """One tile; eight rows at a time: what follows the last has weights of zero."""
    pair_nbytes = _pair_nbytes(shape)
    tile = pairs_zero(shape)
    for row in range(0, rows, 8):
        offset = row // 2 * pair_nbytes
        ask_for_line(ahead + 16 * row)
        ask_for_line(ahead + 16 * row + 64)
        tile = pairs_add_rows(shape, tile, panel + offset, panel_nbytes, weights + 2 * row, nbytes)
    pairs_store(shape, tile, weights + nbytes - 4, nbytes, out, out_nbytes, add)


@inner
def _sweep(shape, panels, panel_nbytes, count, rows, weights, nbytes, out, out_nbytes, add, ahead):
    """Tiles of int8, a panel each: memory is read, and asked for, in the order in which it lies."""
    for panel in range(count):
        offset = panel * panel_nbytes
        _tile(shape, panels + offset, panel_nbytes, rows, weights, nbytes, out + 64 * panel, out_nbytes, add,
              ahead + offset)  # fmt: skip


@inner
def multiply_int8_panels(code, panels, panel_nbytes, count, rows, weights, nbytes, heads, out, out_nbytes, add, ahead):
    """Out[h][16 p + lane] = sum over r < rows of weights[h][r] panel p's [r][lane]; added to what is there if `add`.

    code: of int8. panels: address of `count` panels, panel_nbytes apart; up to seven rows after their last are read
    and may be anything. weights: address of `round_row`'s [heads], `nbytes` apart. out: address of fp32
    [heads][16 count], out_nbytes apart. ahead: address of what is read next, of which as many bytes are asked for.
    """
    head = 0
    while head < heads:
        at, target = weights + head * nbytes, out + head * out_nbytes
        if has_many_registers(code) and heads - head >= 8:
            _sweep(_EIGHT_BY_WIDE, panels, panel_nbytes, count, rows, at, nbytes, target, out_nbytes, add, ahead)
            head += 8
        elif has_many_registers(code) and heads - head >= 4:
            _sweep(_FOUR_BY_WIDE, panels, panel_nbytes, count, rows, at, nbytes, target, out_nbytes, add, ahead)
            head += 4
        elif heads - head >= 4:
            _sweep(_FOUR_BY_ONE, panels, panel_nbytes, count, rows, at, nbytes, target, out_nbytes, add, ahead)
            head += 4
        elif heads - head >= 2:
            _sweep(_TWO_BY_ONE, panels, panel_nbytes, count, rows, at, nbytes, target, out_nbytes, add, ahead)
            head += 2
        else:
            _sweep(_ONE_BY_ONE, panels, panel_nbytes, count, rows, at, nbytes, target, out_nbytes, add, ahead)
            head += 1


@inner
def add_int4_half(code, half, rows, weights, nbytes, heads, out, out_nbytes, ahead):
    """Out[h][lane] += sum over r < rows of weights[h][r] [r][lane] for 32 lanes of one panel of int4.

    code: of int4. half: address of these lanes of the first pair of rows. ahead: of what is read next, 16 bytes a
    row. The other arguments are those of `multiply_int8_panels`.
    """
    head = 0
    while head < heads:
        at, target = weights + head * nbytes, out + head * out_nbytes
        if has_many_registers(code) and heads - head >= 4:
            _tile(_FOUR_BY_HALF, half, 0, rows, at, nbytes, target, out_nbytes, True, ahead)
            head += 4
        elif heads - head >= 4:
            _tile(_FOUR_BY_LOW, half, 0, rows, at, nbytes, target, out_nbytes, True, ahead)
            _tile(_FOUR_BY_HIGH, half, 0, rows, at, nbytes, target + 64, out_nbytes, True, ahead)
            head += 4
        elif heads - head >= 2:
            _tile(_TWO_BY_HALF, half, 0, rows, at, nbytes, target, out_nbytes, True, ahead)
            head += 2
        else:
            _tile(_ONE_BY_HALF, half, 0, rows, at, nbytes, target, out_nbytes, True, ahead)
            head += 1
