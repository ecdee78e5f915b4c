# mypy: allow-untyped-defs, allow-incomplete-defs
"""Blocks of a weight matrix as matrix products take them, out of the bytes that `formats` describes."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.rounding_kernel import rounded


@triton.constexpr_function
def group_columns(format):
    """Columns that share a scale."""
    return {"int8": 64, "fp8_e4m3": 128}.get(format, 32)


@triton.constexpr_function
def bits_of(format):
    """Bits of a code."""
    return 4 if format in ("int4", "mxfp4") else 8


@triton.jit
def load_elements(matrix, row, column, rows, columns, DOT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Block [ROWS, COLUMNS] of a row-major matrix of elements, as DOT; zero outside of the matrix.

    matrix: pointer to the elements. row, column: where the block starts. rows, columns: of the matrix.
    """
    n = row + tl.arange(0, ROWS)
    k = column + tl.arange(0, COLUMNS)
    inside = (n < rows)[:, None] & (k < columns)[None, :]
    return tl.load(matrix + n[:, None].to(tl.int64) * columns + k[None, :], mask=inside, other=0.0).to(DOT)


@triton.jit
def load_codes(
    codes, row, column, rows, columns, FORMAT: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Block [ROWS, COLUMNS] of a packed matrix without its scales, as DOT, which holds every code's value exactly.

    A tile's steps are contiguous, so a row of threads reads 16 bytes each; what follows renames registers and splits
    bytes, and moves nothing between threads.

    codes: pointer to bytes. row, column: where the block starts, multiples of 16 and of 8. rows, columns: of the
    matrix. Past the padded matrix, values are finite and have no meaning: activations are zero there.
    """
    BITS: tl.constexpr = bits_of(FORMAT)
    TILES: tl.constexpr = ROWS // 16
    STEPS: tl.constexpr = COLUMNS * BITS // 32
    tile = row // 16 + tl.arange(0, TILES)
    byte = column * (BITS * 2) + tl.arange(0, STEPS * 64)
    tile_nbytes = (columns + 63) // 64 * (BITS * 128)
    inside = (tile < (rows + 15) // 16)[:, None] & (byte < tile_nbytes)[None, :]
    raw = tl.load(codes + tile[:, None].to(tl.int64) * tile_nbytes + byte[None, :], mask=inside, other=0)
    if BITS == 8:
        steps = tl.permute(tl.reshape(raw, [TILES, STEPS, 16, 4]), [0, 2, 1, 3])
    else:
        nibbles = tl.reshape(tl.join(raw & 15, raw >> 4), [TILES, STEPS, 16, 4, 2])
        steps = tl.permute(nibbles, [0, 2, 1, 4, 3])
    return code_values(tl.reshape(steps, [ROWS, COLUMNS]), FORMAT).to(DOT)


@triton.jit
def code_values(code, FORMAT: tl.constexpr):
    """The values of codes (uint8) without their scale: int16 or fp16, exact.

    The bits of e2m1 and e4m3 are moved to where fp16 has them; the product makes up for the other exponent bias, and
    denormals come out right by themselves.
    """
    wide = code.to(tl.int16)
    if FORMAT == "int8":
        values = wide - 128
    elif FORMAT == "int4":
        values = wide - 8
    elif FORMAT == "mxfp4":
        magnitude = ((wide & 7) << 9).to(tl.float16, bitcast=True) * 16384.0
        values = tl.where((wide & 8) != 0, -magnitude, magnitude)
    else:
        magnitude = ((wide & 127) << 7).to(tl.float16, bitcast=True) * 256.0
        values = tl.where((wide & 128) != 0, -magnitude, magnitude)
    return values


@triton.jit
def load_scales(
    scales, row, column, rows, columns, FORMAT: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Scales of ROWS rows and GROUPS groups of columns from a group's start on: fp32 [ROWS, GROUPS].

    For fp8_e4m3 the rows lie in one block of 128 and GROUPS is 1.

    scales: pointer to bytes. The rest is as `load_codes` takes it.
    """
    GROUP: tl.constexpr = group_columns(FORMAT)
    if FORMAT == "fp8_e4m3":
        across = (columns + 127) // 128
        at = scales.to(tl.pointer_type(tl.float32)) + (row // 128) * across + column // GROUP
        inside = (row < rows) & (column < columns)
        result = tl.zeros([ROWS, GROUPS], tl.float32) + tl.load(at, mask=inside, other=0.0)
    else:
        TILES: tl.constexpr = ROWS // 16
        in_tile = (columns + 63) // 64 * (64 // GROUP) * 16
        tile = row // 16 + tl.arange(0, TILES)
        entry = column // GROUP * 16 + tl.arange(0, GROUPS * 16)
        inside = (tile < (rows + 15) // 16)[:, None] & (entry < in_tile)[None, :]
        index = tile[:, None] * in_tile + entry[None, :]
        if FORMAT == "mxfp4":
            power = tl.load(scales + index, mask=inside, other=0).to(tl.int32)
            # 2^-127 is a denormal of fp32; 255 is NaN.
            bits = tl.where(power == 0, 1 << 22, tl.where(power == 255, 0x7FC00000, power << 23))
            values = bits.to(tl.float32, bitcast=True)
        else:
            values = tl.load(scales.to(tl.pointer_type(tl.bfloat16)) + index, mask=inside, other=0.0).to(tl.float32)
        result = tl.reshape(tl.permute(tl.reshape(values, [TILES, GROUPS, 16]), [0, 2, 1]), [ROWS, GROUPS])
    return result


@triton.jit
def multiply_add(
    sums, x, weights, scales, row, column, rows, columns, FORMAT: tl.constexpr, ELEMENT: tl.constexpr,
    DOT: tl.constexpr, SCALE_WEIGHTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The fp32 sums [T, ROWS] plus x [T, COLUMNS] times a block of weights, transposed.

    ELEMENT: the dtype of activations. DOT: that of the product's operands.
    SCALE_WEIGHTS: of packed formats, round code x scale to ELEMENT and multiply once: cheap for many tokens. Otherwise
    COLUMNS is one group, or a part of one, codes are multiplied exactly and their sum is scaled: cheap for few tokens,
    and no weight is rounded.
    """
    if FORMAT == "bf16" or FORMAT == "fp16" or FORMAT == "fp32":
        block = load_elements(weights, row, column, rows, columns, DOT, ROWS, COLUMNS)
        sums = tl.dot(x, tl.trans(block), sums, input_precision="ieee")
    elif not SCALE_WEIGHTS or FORMAT == "fp8_e4m3":
        block = load_codes(weights, row, column, rows, columns, FORMAT, DOT, ROWS, COLUMNS)
        scale = tl.reshape(load_scales(scales, row, column, rows, columns, FORMAT, ROWS, 1), [1, ROWS])
        sums += tl.dot(x, tl.trans(block), input_precision="ieee") * scale
    else:
        GROUPS: tl.constexpr = COLUMNS // group_columns(FORMAT)
        block = load_codes(weights, row, column, rows, columns, FORMAT, tl.float32, ROWS, COLUMNS)
        scale = load_scales(scales, row, column, rows, columns, FORMAT, ROWS, GROUPS)
        scaled = tl.reshape(block, [ROWS, GROUPS, COLUMNS // GROUPS]) * scale[:, :, None]
        block = rounded(tl.reshape(scaled, [ROWS, COLUMNS]), ELEMENT).to(DOT)
        sums = tl.dot(x, tl.trans(block), sums, input_precision="ieee")
    return sums
