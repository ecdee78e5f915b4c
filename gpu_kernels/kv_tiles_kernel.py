# mypy: allow-untyped-defs, allow-incomplete-defs
"""Tiles of one head of a KV block as matrix products take them, out of the bytes that `formats.kv` describes.

`token_lanes` reads panels whose lanes are tokens, `channel_lanes` those whose lanes are channels. Both give codes or
elements as DOT, which holds each of them exactly, without scales, but int4: its codes come with scale and zero point.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.rounding_kernel import rounded
from gpu_kernels.weights_kernel import code_values


@triton.jit
def _typed(part, FORMAT: tl.constexpr):
    """A part of a block as a pointer to what is loaded at once: elements, bytes, pairs of int8, words of int4."""
    if FORMAT == "bf16":
        typed = part.to(tl.pointer_type(tl.bfloat16))
    elif FORMAT == "fp16":
        typed = part.to(tl.pointer_type(tl.float16))
    elif FORMAT == "fp32":
        typed = part.to(tl.pointer_type(tl.float32))
    elif FORMAT == "int8":
        typed = part.to(tl.pointer_type(tl.int16))
    elif FORMAT == "int4":
        typed = part.to(tl.pointer_type(tl.int32))
    else:
        typed = part.to(tl.pointer_type(tl.uint8))
    return tl.multiple_of(typed, 64)


@triton.jit
def _halves(pairs, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Int16 [ROWS / 2, LANES], a byte of each of two rows, as int8 [ROWS, LANES]."""
    both = tl.join(pairs.to(tl.int8), (pairs >> 8).to(tl.int8))
    return tl.reshape(tl.permute(both, [0, 2, 1]), [ROWS, LANES])


@triton.jit
def _nibbles(words, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Int32 [ROWS / 2, LANES / 4], four lanes of each of two rows, as codes [ROWS, LANES]."""
    lying = tl.reshape(words, [ROWS // 2, 1, LANES // 32, 1, 8])
    row = tl.reshape(tl.arange(0, 2), [1, 2, 1, 1, 1])
    nibble = tl.reshape(tl.arange(0, 4), [1, 1, 1, 4, 1])
    return tl.reshape((lying >> (row * 16 + nibble * 4)) & 15, [ROWS, LANES])


@triton.jit
def _bf16(part):
    return tl.multiple_of(part.to(tl.pointer_type(tl.bfloat16)), 32)


@triton.jit
def token_lanes(
    codes, scales, zeros, first, there, FORMAT: tl.constexpr, ELEMENT: tl.constexpr, DOT: tl.constexpr,
    WIDTH: tl.constexpr, PANEL_ROWS: tl.constexpr, DEPTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """[DEPTH, TOKENS] of keys, from token `first` of the block on; zero past WIDTH and where a token is not `there`.

    codes, scales, zeros: pointers to bytes of the parts. there: [TOKENS]. WIDTH: channels. PANEL_ROWS: rows of a panel.
    TOKENS divides what `first` is a multiple of; int4 has at least 32. Its tokens that are not there are finite and
    have no meaning.
    """
    lying = _typed(codes, FORMAT)
    d = tl.arange(0, DEPTH)
    if FORMAT == "int4":
        HALVES: tl.constexpr = TOKENS // 32
        word = tl.arange(0, TOKENS // 4)
        half = first // 32 + word // 8
        at = half // 2 * (PANEL_ROWS * 8) + half % 2 * 8 + word % 8
        pair = tl.arange(0, DEPTH // 2)
        inside = (pair < PANEL_ROWS // 2)[:, None] & (word >= 0)[None, :]
        found = _nibbles(tl.load(lying + pair[:, None] * 16 + at[None, :], mask=inside, other=0), DEPTH, TOKENS)
        group = (first // 32 + tl.arange(0, HALVES))[None, :] * WIDTH + d[:, None]
        known = (d < WIDTH)[:, None] & (tl.arange(0, HALVES) >= 0)[None, :]
        scale = tl.load(_bf16(scales) + group, mask=known, other=0.0).to(tl.float32)
        zero = tl.load(_bf16(zeros) + group, mask=known, other=0.0).to(tl.float32)
        numbers = tl.reshape(found.to(tl.float32), [DEPTH, HALVES, 32]) * scale[:, :, None] + zero[:, :, None]
        tile = rounded(tl.reshape(numbers, [DEPTH, TOKENS]), ELEMENT).to(DOT)
    else:
        token = first + tl.arange(0, TOKENS)
        if FORMAT == "int8":
            pair = tl.arange(0, DEPTH // 2)
            at = token // 16 * (PANEL_ROWS * 8) + token % 16
            inside = (pair < PANEL_ROWS // 2)[:, None] & there[None, :]
            pairs = tl.load(lying + pair[:, None] * 16 + at[None, :], mask=inside, other=0)
            tile = _halves(pairs, DEPTH, TOKENS).to(DOT)
        else:
            at = token // 16 * (PANEL_ROWS * 16) + token % 16
            inside = (d < WIDTH)[:, None] & there[None, :]
            found = tl.load(lying + d[:, None] * 16 + at[None, :], mask=inside, other=0)
            if FORMAT == "fp8_e4m3":
                found = code_values(found, FORMAT)
            tile = found.to(DOT)
    return tile


@triton.jit
def channel_lanes(
    codes, scales, zeros, first, there, FORMAT: tl.constexpr, ELEMENT: tl.constexpr, DOT: tl.constexpr,
    FIRST: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """[TOKENS, COLUMNS] of values, or of keys of latents: channels FIRST to END, from token `first` of the block on.

    codes, scales, zeros: pointers to bytes of the parts. there: [TOKENS]; where a token is not, numbers are zero.
    FIRST: a multiple of 16, of int4 of 32. BLOCK: tokens of the block. COLUMNS: END - FIRST or more, of int4 at least
    32; past END numbers are finite.
    """
    lying = _typed(codes, FORMAT)
    token = first + tl.arange(0, TOKENS)
    pair = first // 2 + tl.arange(0, TOKENS // 2)
    if FORMAT == "int4":
        HALVES: tl.constexpr = COLUMNS // 32
        word = tl.arange(0, COLUMNS // 4)
        half = FIRST // 32 + word // 8
        at = half // 2 * (BLOCK * 8) + half % 2 * 8 + word % 8
        inside = (half * 32 < END)[None, :] & (pair >= 0)[:, None]
        found = _nibbles(tl.load(lying + pair[:, None] * 16 + at[None, :], mask=inside, other=0), TOKENS, COLUMNS)
        groups = FIRST // 32 + tl.arange(0, HALVES)
        known = (groups * 32 < END)[None, :] & there[:, None]
        group = groups[None, :] * BLOCK + token[:, None]
        scale = tl.load(_bf16(scales) + group, mask=known, other=0.0).to(tl.float32)
        zero = tl.load(_bf16(zeros) + group, mask=known, other=0.0).to(tl.float32)
        numbers = tl.reshape(found.to(tl.float32), [TOKENS, HALVES, 32]) * scale[:, :, None] + zero[:, :, None]
        tile = rounded(tl.reshape(numbers, [TOKENS, COLUMNS]), ELEMENT).to(DOT)
    else:
        e = FIRST + tl.arange(0, COLUMNS)
        if FORMAT == "int8":
            at = e // 16 * (BLOCK * 8) + e % 16
            inside = (pair >= 0)[:, None] & (e < END)[None, :]
            pairs = tl.load(lying + pair[:, None] * 16 + at[None, :], mask=inside, other=0)
            tile = _halves(pairs, TOKENS, COLUMNS).to(DOT)
        else:
            at = e // 16 * (BLOCK * 16) + e % 16
            inside = there[:, None] & (e < END)[None, :]
            found = tl.load(lying + token[:, None] * 16 + at[None, :], mask=inside, other=0)
            if FORMAT == "fp8_e4m3":
                found = code_values(found, FORMAT)
            tile = found.to(DOT)
    return tile


@triton.jit
def token_scales(part, first, there, TOKENS: tl.constexpr):
    """Fp32 [TOKENS] from token `first` of the block on; zero where a token is not `there`."""
    scales = tl.multiple_of(part.to(tl.pointer_type(tl.float32)), 64)
    return tl.load(scales + first + tl.arange(0, TOKENS), mask=there, other=0.0)
