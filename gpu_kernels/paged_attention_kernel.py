# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention of a few new tokens to blocks of a KV cache, read where they lie."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.kv_tiles_kernel import channel_lanes, token_lanes, token_scales
from gpu_kernels.rounding_kernel import rounded


# Parts and columns of a mask become more as a text grows: no reason to compile again.
@triton.jit(do_not_specialize=["parts", "valid_columns"])
def paged_attention_kernel(
    query, offsets, addresses, lengths, first_positions, query_positions, valid, out, lse, parts, new, group,
    valid_columns, window, scale, softcap, query_list, query_head, query_token,
    FORMAT: tl.constexpr, ELEMENT: tl.constexpr, DOT: tl.constexpr, SOFTCAP: tl.constexpr,
    PADDED: tl.constexpr, KEYS: tl.constexpr, KEY_SCALES: tl.constexpr, KEY_ZEROS: tl.constexpr, VALUES: tl.constexpr,
    VALUE_SCALES: tl.constexpr, VALUE_ZEROS: tl.constexpr, HEAD_NBYTES: tl.constexpr, BLOCK: tl.constexpr,
    PANEL_ROWS: tl.constexpr, WIDTH: tl.constexpr, VALUE: tl.constexpr, LATENT: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One part of softmax(scale q K^T) V of ROWS (head of the group, new token) pairs of one key-value head of a list.

    Program (l, h, i parts + p): list l, key-value head h, block i of pairs, part p of the tiles of TOKENS tokens that
    any of its pairs may see. Pair g new + t is head h group + g, token t.

    query: [lists, heads, new, WIDTH] by strides. offsets, addresses, lengths, first_positions, query_positions: see
    `paged_attention`, int64. valid: bytes [lists, valid_columns], read if PADDED. out: fp32 [parts, lists, heads, new,
    VALUE]; lse: fp32 [parts, lists, heads, new]; -inf and rows of 0 where nothing is seen. window: 0 for none.
    ELEMENT: what weights are rounded to, and int4's numbers. KEYS to VALUE_ZEROS: byte offsets of a head's parts.
    LATENT: values are the first VALUE channels of keys, whose lanes are channels then; DEPTH is of the others.
    """
    index = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2) % parts
    row = tl.program_id(2) // parts * ROWS + tl.arange(0, ROWS)
    live = row < group * new
    query_row = head * group + row // new
    new_token = row % new
    position = tl.load(query_positions + index * new + new_token, mask=live, other=-1).to(tl.int32)
    # From here on positions are tokens of the list.
    start = tl.load(first_positions + index).to(tl.int32)
    position = position - start
    end = tl.minimum(tl.load(lengths + index).to(tl.int32), tl.max(tl.where(live, position, -1), 0) + 1)
    first = tl.where(window > 0, tl.min(tl.where(live, position, 1 << 30), 0) - window + 1, 0)
    first = tl.maximum(first, 0)
    tiles = (tl.maximum(end, 0) + TOKENS - 1) // TOKENS
    skipped = tl.minimum(first // TOKENS, tiles)
    share = (tiles - skipped + parts - 1) // parts
    begin = skipped + part * share
    blocks = addresses + tl.load(offsets + index)
    seen_from = valid + index.to(tl.int64) * valid_columns + start

    d = tl.arange(0, DEPTH)
    e = tl.arange(0, COLUMNS)
    asked = query + index.to(tl.int64) * query_list + query_row.to(tl.int64) * query_head
    asked = (asked + new_token.to(tl.int64) * query_token)[:, None]
    if LATENT:
        q_value = tl.load(asked + e[None, :], mask=live[:, None] & (e < VALUE)[None, :], other=0.0).to(DOT)
        q = tl.load(asked + VALUE + d[None, :], mask=live[:, None] & (d < WIDTH - VALUE)[None, :], other=0.0).to(DOT)
    else:
        q = tl.load(asked + d[None, :], mask=live[:, None] & (d < WIDTH)[None, :], other=0.0).to(DOT)

    BY_TOKEN: tl.constexpr = FORMAT == "fp8_e4m3" or FORMAT == "int8"
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(begin, tl.minimum(begin + share, tiles)):
        token = tile * TOKENS + tl.arange(0, TOKENS)
        there = (token >= first) & (token < end)
        if PADDED:
            there = there & (tl.load(seen_from + token, mask=there, other=0) != 0)
        address = tl.load(blocks + tile * TOKENS // BLOCK) + head.to(tl.int64) * HEAD_NBYTES
        block = address.to(tl.pointer_type(tl.uint8))
        at = tile * TOKENS % BLOCK
        if LATENT:
            v = channel_lanes(
                block + KEYS, block + KEY_SCALES, block + KEY_ZEROS, at, there, FORMAT, ELEMENT, DOT, 0, VALUE, BLOCK,
                COLUMNS, TOKENS,
            )  # fmt: skip
            scores = tl.dot(q_value, tl.trans(v), input_precision="ieee")
            if BY_TOKEN:
                v_scales = token_scales(block + KEY_SCALES, at, there, TOKENS)
                scores = scores * v_scales[None, :]
            if WIDTH > VALUE:
                k = channel_lanes(
                    block + KEYS, block + KEY_SCALES, block + KEY_ZEROS, at, there, FORMAT, ELEMENT, DOT, VALUE, WIDTH,
                    BLOCK, DEPTH, TOKENS,
                )  # fmt: skip
                rest = tl.dot(q, tl.trans(k), input_precision="ieee")
                if BY_TOKEN:
                    rest = rest * token_scales(block + KEY_SCALES + 4 * BLOCK, at, there, TOKENS)[None, :]
                scores += rest
        else:
            k = token_lanes(
                block + KEYS, block + KEY_SCALES, block + KEY_ZEROS, at, there, FORMAT, ELEMENT, DOT, WIDTH, PANEL_ROWS,
                DEPTH, TOKENS,
            )  # fmt: skip
            scores = tl.dot(q, k, input_precision="ieee")
            if BY_TOKEN:
                scores = scores * token_scales(block + KEY_SCALES, at, there, TOKENS)[None, :]
                v_scales = token_scales(block + VALUE_SCALES, at, there, TOKENS)
            v = channel_lanes(
                block + VALUES, block + VALUE_SCALES, block + VALUE_ZEROS, at, there, FORMAT, ELEMENT, DOT, 0, VALUE,
                BLOCK, COLUMNS, TOKENS,
            )  # fmt: skip
        scores = scores * scale
        if SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp(scores * (2.0 / softcap)) + 1.0))
        seen = there[None, :] & (token[None, :] <= position[:, None])
        seen = seen & ((window <= 0) | (token[None, :] > position[:, None] - window))
        scores = tl.where(seen, scores, float("-inf"))
        new_most = tl.maximum(most, tl.max(scores, 1))
        # While nothing was seen the maximum is -inf, from which nothing can be subtracted.
        safe = tl.where(new_most == float("-inf"), 0.0, new_most)
        shrink = tl.exp(most - safe)
        weights = tl.exp(scores - safe[:, None])
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        if BY_TOKEN:
            # The largest scale is taken out, so that no weight times its scale is too small for fp16.
            largest = tl.max(v_scales, 0)
            largest = tl.where(largest > 0.0, largest, 1.0)
            weights = tl.where(weights == 0.0, 0.0, weights * (v_scales / largest)[None, :])
            part_sums = tl.dot(rounded(weights, ELEMENT).to(DOT), v, input_precision="ieee")
            sums += part_sums * largest
        else:
            sums = tl.dot(rounded(weights, ELEMENT).to(DOT), v, sums, input_precision="ieee")
        most = new_most

    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    seen_any = total != 0.0
    logs = tl.where(seen_any, most + tl.log(tl.where(seen_any, total, 1.0)), float("-inf"))
    lists = tl.num_programs(0)
    heads = tl.num_programs(1) * group
    to = ((part * lists + index).to(tl.int64) * heads + query_row) * new + new_token
    tl.store(out + to[:, None] * VALUE + e[None, :], result, mask=live[:, None] & (e < VALUE)[None, :])
    tl.store(lse + to, logs, mask=live)
