# mypy: allow-untyped-defs
"""Packs rows of fp32 into the quantised KV formats with the bytes of `formats.kv_pack`, scalar by scalar.

A block is packed once for every 64 tokens of a layer, so this need not be as fast as attention.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.jit import carray, entry, inner
from cpu_kernels.packed_tiles import bits_of_float32, int8_pointer
from cpu_kernels.simd import float32_from_bits, float32_pointer
from formats.packed import E4M3_MAX, SMALLEST_MAGNITUDE

FP8, INT8 = range(2)
_LANES, _WIDE, _GROUP = 16, 64, 32
_NAN, _ZERO, _ONE = np.float32(np.nan), np.float32(0), np.float32(1)
_SMALLEST = np.float32(SMALLEST_MAGNITUDE)
_LARGEST = (np.float32(E4M3_MAX), np.float32(127))
_SHARE = (np.float32(1 / E4M3_MAX), np.float32(1 / 127))
_FIFTEENTH = np.float32(1 / 15)


@inner
def _is_finite(x):
    return x - x == _ZERO


@inner
def _e4m3(x):
    """The code of the nearest e4m3 number, of magnitudes up to 448."""
    bits = np.int64(bits_of_float32(x)) & np.int64(0x7FFFFFFF)
    if bits >= 121 << 23:
        code = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    else:
        code = np.int64(np.rint(abs(x) * np.float32(512)))
    return code | 0x80 if x < _ZERO and code > 0 else code


@inner
def _place(kind, by_channel, token, column, columns, tokens):
    """Where a number lies among panels of 16 lanes; int8 has pairs of rows."""
    panel, row, rows, lane = token // _LANES, column, columns, token % _LANES
    if by_channel:
        panel, row, rows, lane = column // _LANES, token, tokens, column % _LANES
    if kind == FP8:
        return (panel * rows + row) * _LANES + lane
    return panel * (rows + rows % 2) * _LANES + row // 2 * 2 * _LANES + 2 * lane + row % 2


@entry("void(int64, float32[:, ::1], boolean, int64, int64, int64, int64)")
def pack_eight_bits(kind: int, rows: Any, by_channel: bool, first: int, end: int, codes: int, scales: int) -> None:
    """The columns [first, end) of rows [tokens, columns] to codes, with one scale a token; kind: FP8 or INT8."""
    tokens, columns = rows.shape
    lying = carray(int8_pointer(codes), (tokens * (columns + columns % 2),))
    factors = carray(float32_pointer(scales), (tokens,))
    largest = _LARGEST[0] if kind == FP8 else _LARGEST[1]
    share = _SHARE[0] if kind == FP8 else _SHARE[1]
    for token in range(tokens):
        magnitude, finite = _ZERO, True
        for column in range(first, end):
            magnitude = max(magnitude, abs(rows[token, column]))
            finite = finite and _is_finite(rows[token, column])
        scale = magnitude * share if magnitude >= _SMALLEST else _ZERO
        factors[token] = scale if finite else _NAN
        inverse = _ONE / scale if finite and scale > _ZERO else _ZERO
        for column in range(first, end):
            scaled = rows[token, column] * inverse
            scaled = min(max(scaled, -largest), largest) if finite else _ZERO
            code = _e4m3(scaled) if kind == FP8 else np.int64(np.rint(scaled))
            lying[_place(kind, by_channel, token, column, columns, tokens)] = code


@inner
def _bf16_below(x):
    bits = np.int64(bits_of_float32(x)) & np.int64(0xFFFFFFFF)
    kept = bits & 0xFFFF0000
    if bits != kept and x < _ZERO:
        kept += 0x10000
    return kept


@inner
def _bf16_above(x):
    bits = np.int64(bits_of_float32(x)) & np.int64(0xFFFFFFFF)
    kept = bits & 0xFFFF0000
    return kept + 0x10000 if bits != kept else kept


@inner
def _pack_group(numbers, codes):
    """32 numbers to codes; returns scale and zero point as bits of bf16."""
    smallest = largest = numbers[0]
    finite = True
    for i in range(_GROUP):
        smallest, largest = min(smallest, numbers[i]), max(largest, numbers[i])
        finite = finite and _is_finite(numbers[i])
    zero_bits = _bf16_below(smallest + _ZERO)
    zero = float32_from_bits(np.int32(zero_bits))
    spread = largest - zero
    if not finite or not _is_finite(spread):
        codes[:] = 0
        return 0x7FC0, 0x7FC0
    scale_bits = _bf16_above(spread * _FIFTEENTH) if spread >= _SMALLEST else 0
    scale = float32_from_bits(np.int32(scale_bits))
    inverse = _ONE / scale if scale > _ZERO else _ZERO
    for i in range(_GROUP):
        codes[i] = np.int64(min(max(np.rint((numbers[i] - zero) * inverse), _ZERO), np.float32(15)))
    return scale_bits >> 16, zero_bits >> 16


@entry("void(float32[:, ::1], boolean, uint8[::1], uint16[::1], uint16[::1])")
def pack_four_bits(rows: Any, by_channel: bool, codes: Any, scales: Any, zeros: Any) -> None:
    """Rows [tokens, columns], of values or of keys with lanes of tokens, to int4; codes are zero before."""
    tokens, columns = rows.shape
    across, along = (tokens, columns) if by_channel else (columns, tokens)
    numbers, group_codes = np.empty(_GROUP, np.float32), np.empty(_GROUP, np.int64)
    for group in range(along // _GROUP):
        for other in range(across):
            for i in range(_GROUP):
                lane = group * _GROUP + i
                numbers[i] = rows[other, lane] if by_channel else rows[lane, other]
            scale, zero = _pack_group(numbers, group_codes)
            scales[group * across + other], zeros[group * across + other] = scale, zero
            for i in range(_GROUP):
                lane = group * _GROUP + i
                half, nibble, word = lane % _WIDE // 32, lane % 32 // 8, lane % 8
                pair = lane // _WIDE * ((across + 1) // 2) + other // 2
                at = 64 * pair + 32 * half + 4 * word + 2 * (other % 2) + nibble // 2
                codes[at] |= group_codes[i] << (4 * (nibble % 2))
