# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention over parts of the keys, each with its log-sum-exp, and the merge of parts."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.rounding_kernel import rounded


@triton.jit
def attention_partial_kernel(
    q, k, v, lengths, out, lse, queries, keys, group, first_query, window, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    CAUSAL: tl.constexpr, DOT: tl.constexpr, PARTS: tl.constexpr, HEAD: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, DEPTH: tl.constexpr, VALUES: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """One part of softmax(scale q K^T) V for QUERIES (head of the group, query) pairs of one KV head.

    Program (b, h, i PARTS + p): sequence b, KV head h, block i of pairs, part p of its keys. The heads of a group share
    a block, so that keys are read once for all of them. Pair g queries + i is head h group + g, query i.

    lengths: int32 [B], keys of each sequence. Query i sees key j if j < length, and with CAUSAL if
    j <= first_query + i, and if j > first_query + i - window where window > 0. out: fp32 [PARTS, B, H, Q, VALUES];
    lse: fp32 [PARTS, B, H, Q], natural logarithm, -inf and rows of 0 where nothing is seen. HEAD and VALUE are the
    sizes of keys and values, DEPTH and VALUES the next powers of two.
    """
    batch = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    part = tl.program_id(2) % PARTS
    pair = tl.program_id(2) // PARTS * QUERIES + tl.arange(0, QUERIES)
    live = pair < group * queries
    query_head = head * group + pair // queries
    query = pair % queries
    position = first_query + query
    length = tl.minimum(tl.load(lengths + batch), keys)
    d = tl.arange(0, DEPTH)
    e = tl.arange(0, VALUES)
    q_at = q + batch.to(tl.int64) * q_batch + query_head.to(tl.int64) * q_head + query.to(tl.int64) * q_row
    block = tl.load(q_at[:, None] + d[None, :], mask=live[:, None] & (d < HEAD)[None, :], other=0.0).to(DOT)

    blocks = (length + KEYS - 1) // KEYS
    share = (blocks + PARTS - 1) // PARTS
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, VALUES], tl.float32)
    k_at = k + batch.to(tl.int64) * k_batch + head.to(tl.int64) * k_head
    v_at = v + batch.to(tl.int64) * v_batch + head.to(tl.int64) * v_head
    for index in range(part * share, tl.minimum(part * share + share, blocks)):
        key = index * KEYS + tl.arange(0, KEYS)
        there = key < length
        rows = key.to(tl.int64)[:, None]
        k_block = tl.load(k_at + rows * k_row + d[None, :], mask=there[:, None] & (d < HEAD)[None, :], other=0.0)
        scores = tl.dot(block, tl.trans(k_block.to(DOT)), input_precision="ieee") * scale
        seen = there[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= position[:, None])
        seen = seen & ((window <= 0) | (key[None, :] > position[:, None] - window))
        scores = tl.where(seen, scores, float("-inf"))
        new_most = tl.maximum(most, tl.max(scores, 1))
        # While nothing was seen the maximum is -inf, from which nothing can be subtracted.
        safe = tl.where(new_most == float("-inf"), 0.0, new_most)
        shrink = tl.exp(most - safe)
        weights = tl.exp(scores - safe[:, None])
        v_block = tl.load(v_at + rows * v_row + e[None, :], mask=there[:, None] & (e < VALUE)[None, :], other=0.0)
        sums = sums * shrink[:, None]
        sums = tl.dot(rounded(weights, v.dtype.element_ty).to(DOT), v_block.to(DOT), sums, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        most = new_most

    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    seen_any = total > 0.0
    logs = tl.where(seen_any, most + tl.log(tl.where(seen_any, total, 1.0)), float("-inf"))
    batches = tl.num_programs(0)
    to = (((part * batches + batch) * heads * group + query_head) * queries + query).to(tl.int64)
    tl.store(out + to[:, None] * VALUE + e[None, :], result, mask=live[:, None] & (e < VALUE)[None, :])
    tl.store(lse + to, logs, mask=live)


# Parts become more as a text grows: no reason to compile again.
@triton.jit(do_not_specialize=["count", "rows"])
def merge_kernel(parts, lse, out, out_lse, count, rows, size, COLUMNS: tl.constexpr):
    """out[r] = sum over p of e^(lse[p, r] - m) parts[p, r] / sum over p of e^(lse[p, r] - m), m the largest of `count`.

    One program for each row. out_lse[r] = m + log of that sum; -inf, and a row of 0, where all parts have -inf.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < size
    most = tl.load(lse + row)
    for part in range(1, count):
        most = tl.maximum(most, tl.load(lse + part * rows + row))
    safe = tl.where(most == float("-inf"), 0.0, most)
    total = tl.zeros([COLUMNS], tl.float32)
    sums = tl.zeros([COLUMNS], tl.float32)
    for part in range(count):
        # A vector of equal weights: the interpreter cannot combine a scalar comparison of floats with a mask.
        weight = tl.zeros([COLUMNS], tl.float32) + tl.exp(tl.load(lse + part * rows + row) - safe)
        # The rows of a part that saw nothing are not read.
        read = inside & (weight > 0.0)
        sums += weight * tl.load(parts + (part * rows + row) * size + column, mask=read, other=0.0)
        total += weight
    result = sums / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * size + column, rounded(result, out.dtype.element_ty), mask=inside)
    logs = tl.where(total > 0.0, safe + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    tl.store(out_lse + row + column * 0, logs, mask=column == 0)
