# mypy: allow-untyped-defs, allow-incomplete-defs
"""Blocks of a weight matrix as matrix products take them, out of the bytes that `formats` describes."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.launch import interpreting
from gpu_kernels.rounding_kernel import rounded

_INTERPRETED = tl.constexpr(interpreting())


@triton.constexpr_function
def group_columns(format):
    """Columns that share a scale."""
    return {"int8": 64, "fp8_e4m3": 128}.get(format, 32)


@triton.constexpr_function
def bits_of(format):
    """Bits of a code."""
    return 4 if format in ("int4", "mxfp4") else 8


@triton.constexpr_function
def rows_first(format, scale_weights):
    """Whether weights are the first operand of a product, which takes them from registers as they were unpacked."""
    return format in ("int8", "int4", "mxfp4", "fp8_e4m3") and not scale_weights


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
    codes, row, column, rows, columns, FORMAT: tl.constexpr, ELEMENT: tl.constexpr, IN_ORDER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Block [ROWS, COLUMNS] of a packed matrix without its scales: numbers of two bytes, which hold every code's value
    exactly, bf16 where ELEMENT is and else fp16; in the interpreter the same in fp32.

    A step has four bytes of each row, which are one word here. Bytes 0 and 2 lie in the halves of that word, 1 and 3 in
    those of the word moved by a byte, so two numbers are made at a time and stay in the register that the product
    takes them from. IN_ORDER: columns ascend; otherwise they are as `in_order_of_codes` has them, which moves nothing.

    codes: pointer to bytes, aligned to words. row, column: where the block starts, multiples of 16 and of the columns
    of four steps. rows, columns: of the matrix. Past the padded matrix, values are finite and have no meaning:
    activations are zero there.
    """
    BITS: tl.constexpr = bits_of(FORMAT)
    TILES: tl.constexpr = ROWS // 16
    STEPS: tl.constexpr = COLUMNS * BITS // 32
    tile = row // 16 + tl.arange(0, TILES)
    word = column * (BITS // 2) + tl.arange(0, STEPS * 16)
    tile_words = (columns + 63) // 64 * (BITS * 32)
    inside = (tile < (rows + 15) // 16)[:, None] & (word < tile_words)[None, :]
    words = codes.to(tl.pointer_type(tl.uint32))
    raw = tl.load(words + tile[:, None].to(tl.int64) * tile_words + word[None, :], mask=inside, other=0)
    raw = tl.permute(tl.reshape(raw, [TILES, STEPS, 16]), [0, 2, 1])
    if BITS == 8:
        values = _values_of_pairs(tl.join(raw, raw >> 8), FORMAT, ELEMENT)
        if IN_ORDER:
            values = tl.permute(values, [0, 1, 2, 4, 3])
    else:
        nibbles = tl.join(tl.join(raw, raw >> 8), tl.join(raw >> 4, raw >> 12))
        values = _values_of_pairs(nibbles, FORMAT, ELEMENT)
        if IN_ORDER:
            values = tl.permute(values, [0, 1, 2, 4, 5, 3])
        else:
            values = tl.permute(tl.reshape(values, [ROWS, STEPS // 4, 4, 2, 2, 2]), [0, 1, 4, 2, 3, 5])
    return tl.reshape(values, [ROWS, COLUMNS])


@triton.jit
def in_order_of_codes(x, FORMAT: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of x [TOKENS, COLUMNS] as `load_codes` has those of weights when they need not ascend.

    8 bits: 0, 2, 1, 3 of every four. 4 bits: of the eight of each of four steps first 0, 2, 1, 3, then 4, 6, 5, 7.
    """
    if bits_of(FORMAT) == 8:
        x = tl.permute(tl.reshape(x, [TOKENS, COLUMNS // 4, 2, 2]), [0, 1, 3, 2])
    else:
        x = tl.permute(tl.reshape(x, [TOKENS, COLUMNS // 32, 4, 2, 2, 2]), [0, 1, 3, 2, 5, 4])
    return tl.reshape(x, [TOKENS, COLUMNS])


@triton.jit
def _halves(pairs, ELEMENT: tl.constexpr):
    """Words as the two numbers that their halves are, along another last dimension, the lower one first."""
    HALF: tl.constexpr = tl.bfloat16 if tl.bfloat16 == ELEMENT else tl.float16
    if _INTERPRETED and tl.bfloat16 == ELEMENT:
        # The interpreter has no arithmetic of bf16, and widens its denormals wrongly.
        numbers = tl.join(pairs << 16, pairs & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        numbers = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16)).to(HALF, bitcast=True)
    return numbers


@triton.jit
def _values_of_pairs(pairs, FORMAT: tl.constexpr, ELEMENT: tl.constexpr):
    """The values of the codes in the low bits of both halves of each word (uint32), along another last dimension.

    Exact. Other bits of a half are anything. A code in the low bits of 128 (bf16) or 1024 (fp16) makes it that much
    more; bf16 has room for seven bits of int8, whose eighth is in what is subtracted. Bits of e2m1 and e4m3 are moved
    to where the number has them, a product makes up for the other exponent bias, and denormals come out by themselves.
    """
    BF16: tl.constexpr = tl.bfloat16 == ELEMENT
    if FORMAT == "int4":
        numbers = _halves((pairs & 0xF000F) | (0x43004300 if BF16 else 0x64006400), ELEMENT)
        values = numbers - tl.full([], 136.0 if BF16 else 1032.0, numbers.dtype)
    elif FORMAT == "int8" and BF16:
        low = _halves((pairs & 0x7F007F) | 0x43004300, ELEMENT)
        values = low - _halves((pairs & 0x800080) ^ 0x43804380, ELEMENT)
    elif FORMAT == "int8":
        numbers = _halves((pairs & 0xFF00FF) | 0x64006400, ELEMENT)
        values = numbers - tl.full([], 1152.0, numbers.dtype)
    elif FORMAT == "mxfp4":
        magnitude = ((pairs << 6) & 0x1C001C0) if BF16 else ((pairs << 9) & 0xE000E00)
        numbers = _halves(((pairs << 12) & 0x80008000) | magnitude, ELEMENT)
        values = numbers * tl.full([], 2.0**126 if BF16 else 2.0**14, numbers.dtype)
    else:
        magnitude = ((pairs << 4) & 0x7F007F0) if BF16 else ((pairs << 7) & 0x3F803F80)
        numbers = _halves(((pairs << 8) & 0x80008000) | magnitude, ELEMENT)
        values = numbers * tl.full([], 2.0**120 if BF16 else 2.0**8, numbers.dtype)
    return values


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
    """The fp32 sums plus x [T, COLUMNS] times a block of weights [ROWS, COLUMNS], transposed: begin with `no_sums`, and
    end with `tokens_first`.

    ELEMENT: the dtype of activations. DOT: that of the product's operands.
    SCALE_WEIGHTS: of packed formats, round code x scale to ELEMENT and multiply once: cheap for many tokens. Otherwise
    COLUMNS is one group, or a part of one, codes are multiplied exactly and their sum is scaled: cheap for few tokens,
    and no weight is rounded.
    """
    if FORMAT == "bf16" or FORMAT == "fp16" or FORMAT == "fp32":
        block = load_elements(weights, row, column, rows, columns, DOT, ROWS, COLUMNS)
        sums = tl.dot(x, tl.trans(block), sums, input_precision="ieee")
    elif not SCALE_WEIGHTS:
        block = load_codes(weights, row, column, rows, columns, FORMAT, ELEMENT, False, ROWS, COLUMNS).to(DOT)
        scale = load_scales(scales, row, column, rows, columns, FORMAT, ROWS, 1)
        x = in_order_of_codes(x, FORMAT, x.shape[0], COLUMNS)
        sums += tl.dot(block, tl.trans(x), input_precision="ieee") * scale
    elif FORMAT == "fp8_e4m3":
        block = load_codes(weights, row, column, rows, columns, FORMAT, ELEMENT, True, ROWS, COLUMNS).to(DOT)
        scale = tl.reshape(load_scales(scales, row, column, rows, columns, FORMAT, ROWS, 1), [1, ROWS])
        sums += tl.dot(x, tl.trans(block), input_precision="ieee") * scale
    else:
        GROUPS: tl.constexpr = COLUMNS // group_columns(FORMAT)
        # Scaled in fp32, so either will do; what is fewer instructions.
        CODE: tl.constexpr = tl.float16 if FORMAT == "int8" else ELEMENT
        block = load_codes(weights, row, column, rows, columns, FORMAT, CODE, True, ROWS, COLUMNS).to(tl.float32)
        scale = load_scales(scales, row, column, rows, columns, FORMAT, ROWS, GROUPS)
        scaled = tl.reshape(block, [ROWS, GROUPS, COLUMNS // GROUPS]) * scale[:, :, None]
        block = rounded(tl.reshape(scaled, [ROWS, COLUMNS]), ELEMENT).to(DOT)
        sums = tl.dot(x, tl.trans(block), sums, input_precision="ieee")
    return sums


@triton.jit
def no_sums(FORMAT: tl.constexpr, SCALE_WEIGHTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """Zeros in the shape that `multiply_add` adds to."""
    if rows_first(FORMAT, SCALE_WEIGHTS):
        sums = tl.zeros([ROWS, TOKENS], tl.float32)
    else:
        sums = tl.zeros([TOKENS, ROWS], tl.float32)
    return sums


@triton.jit
def tokens_first(sums, FORMAT: tl.constexpr, SCALE_WEIGHTS: tl.constexpr):
    """What `multiply_add` summed as [T, ROWS]."""
    if rows_first(FORMAT, SCALE_WEIGHTS):
        sums = tl.trans(sums)
    return sums
