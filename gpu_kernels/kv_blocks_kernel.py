# mypy: allow-untyped-defs, allow-incomplete-defs
"""Writing new tokens into plain KV blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.rounding_kernel import rounded


@triton.jit
def _elements(address, FORMAT: tl.constexpr):
    if FORMAT == "bf16":
        pointers = address.to(tl.pointer_type(tl.bfloat16))
    elif FORMAT == "fp16":
        pointers = address.to(tl.pointer_type(tl.float16))
    else:
        pointers = address.to(tl.pointer_type(tl.float32))
    return pointers


@triton.jit
def _store(to, numbers, inside):
    tl.store(to, rounded(numbers.to(tl.float32), to.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def write_tokens_kernel(
    keys, values, offsets, addresses, first_tokens, tokens, key_sequence, key_head, key_token, value_sequence,
    value_head, value_token,
    FORMAT: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, HEAD_NBYTES: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, VALUE: tl.constexpr, LATENT: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Token t of sequence b goes to place first_tokens[b] + t of that sequence's blocks, rounded to FORMAT, with
    zeros in the channels that fill up a panel, which kernels multiply with.

    Program (b, h, i): sequence b, head h, tokens i TOKENS onwards. keys: [B, heads, tokens, WIDTH] by strides, values
    likewise [B, heads, tokens, VALUE]; LATENT has keys only, whose lanes are channels. offsets, addresses,
    first_tokens: int64, as of `write_tokens`. KEYS, VALUES: byte offsets of a head's parts.
    """
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    at = tl.load(first_tokens + sequence) + token
    blocks = addresses + tl.load(offsets + sequence)
    block = tl.load(blocks + at // BLOCK, mask=live, other=0) + head * HEAD_NBYTES
    place = at % BLOCK
    token = token.to(tl.int64)
    d = tl.arange(0, DEPTH)
    k = tl.load(
        keys + sequence * key_sequence + head * key_head + token[:, None] * key_token + d[None, :],
        mask=live[:, None] & (d < WIDTH)[None, :], other=0.0,
    )  # fmt: skip
    inside = live[:, None] & (d < WIDTH)[None, :]
    if LATENT:
        inside = live[:, None] & (d < (WIDTH + 15) // 16 * 16)[None, :]
        to = d[None, :] // 16 * (BLOCK * 16) + place[:, None] * 16 + d[None, :] % 16
    else:
        to = (place // 16 * (WIDTH * 16) + place % 16)[:, None] + d[None, :] * 16
    _store(_elements(block + KEYS, FORMAT)[:, None] + to, k, inside)
    if not LATENT:
        e = tl.arange(0, COLUMNS)
        v = tl.load(
            values + sequence * value_sequence + head * value_head + token[:, None] * value_token + e[None, :],
            mask=live[:, None] & (e < VALUE)[None, :], other=0.0,
        )  # fmt: skip
        inside = live[:, None] & (e < (VALUE + 15) // 16 * 16)[None, :]
        to = e[None, :] // 16 * (BLOCK * 16) + place[:, None] * 16 + e[None, :] % 16
        _store(_elements(block + VALUES, FORMAT)[:, None] + to, v, inside)
