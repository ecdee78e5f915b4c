# mypy: allow-untyped-defs, allow-incomplete-defs
"""Grouped matrix products: tiles of one expert's pairs times that expert's matrices, read in place."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.gates_kernel import activate, gated
from gpu_kernels.rounding_kernel import rounded
from gpu_kernels.weights_kernel import multiply_add, no_sums, tokens_first


@triton.jit
def _part(bundle, offset, FORMAT: tl.constexpr):
    """A component of a bundle, by its offset in bytes; components start at multiples of 64."""
    if FORMAT == "bf16":
        part = (bundle + offset).to(tl.pointer_type(tl.bfloat16))
    elif FORMAT == "fp16":
        part = (bundle + offset).to(tl.pointer_type(tl.float16))
    elif FORMAT == "fp32":
        part = (bundle + offset).to(tl.pointer_type(tl.float32))
    else:
        part = (bundle + offset).to(tl.pointer_type(tl.uint8))
    return tl.multiple_of(part, 64)


@triton.jit
def _bias(bundle, offset, n, rows, FORMAT: tl.constexpr):
    """The bias of some rows, fp32; packed formats keep it so."""
    if FORMAT == "bf16" or FORMAT == "fp16":
        bias = _part(bundle, offset, FORMAT)
    else:
        bias = _part(bundle, offset, "fp32")
    return tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]


# Steps differ in how many pairs and experts they have: none of that may be a reason to compile again.
@triton.jit(
    do_not_specialize=["tile_count", "pairs", "pairs_of_row"],
    do_not_specialize_on_alignment=["table", "order", "tiles"],
)
def grouped_linear_kernel(
    x, table, order, tiles, out, tile_count, pairs, rows, columns, pairs_of_row,
    first_weights, first_scales, first_bias, second_weights, second_scales, second_bias,
    FORMAT: tl.constexpr, DOT: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr, SCALE_WEIGHTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[s, p, n] = act(sum over the s-th part of k of x[p // pairs_of_row, k] W[n, k] + b[n]).

    GATED: out[s, p] = act(W1 x + b1, W2 x + b2), or without ACTIVATION both sums side by side [2 rows].
    Program (i, j, s): tile i, rows j ROWS onwards, part s of SPLITS. With more than one split there is no
    ACTIVATION, and the bias is in the first.

    x: [X, columns], row-major. table: int64 [experts], addresses of bundles. order, tiles: see `PairGroups`. rows,
    columns: of a matrix. first_*, second_*: byte offsets of components in a bundle. out: row-major. Sums are fp32.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1) * ROWS
    split = tl.program_id(2)
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    place = tl.load(tiles + tile_count + tile) + tl.arange(0, TOKENS)
    live = place < tl.load(tiles + 2 * tile_count + tile)
    pair = tl.load(order + place, mask=live, other=0)
    bundle = tl.load(table + expert).to(tl.pointer_type(tl.uint8))

    steps = (columns + COLUMNS - 1) // COLUMNS
    part = (steps + SPLITS - 1) // SPLITS
    inputs = x + (pair // pairs_of_row).to(tl.int64)[:, None] * columns
    weights_1, scales_1 = _part(bundle, first_weights, FORMAT), _part(bundle, first_scales, "")
    weights_2, scales_2 = _part(bundle, second_weights, FORMAT), _part(bundle, second_scales, "")
    sums_1 = no_sums(FORMAT, SCALE_WEIGHTS, TOKENS, ROWS)
    sums_2 = no_sums(FORMAT, SCALE_WEIGHTS, TOKENS, ROWS)
    for step in range(split * part, tl.minimum(split * part + part, steps)):
        column = step * COLUMNS
        k = column + tl.arange(0, COLUMNS)[None, :]
        block = tl.load(inputs + k, mask=live[:, None] & (k < columns), other=0.0).to(DOT)
        sums_1 = multiply_add(
            sums_1, block, weights_1, scales_1, row, column, rows, columns, FORMAT, x.dtype.element_ty, DOT,
            SCALE_WEIGHTS, ROWS, COLUMNS,
        )  # fmt: skip
        if GATED:
            sums_2 = multiply_add(
                sums_2, block, weights_2, scales_2, row, column, rows, columns, FORMAT, x.dtype.element_ty, DOT,
                SCALE_WEIGHTS, ROWS, COLUMNS,
            )  # fmt: skip

    sums_1 = tokens_first(sums_1, FORMAT, SCALE_WEIGHTS)
    sums_2 = tokens_first(sums_2, FORMAT, SCALE_WEIGHTS)
    n = row + tl.arange(0, ROWS)
    if BIAS:
        once = (split == 0).to(tl.float32)
        sums_1 += once * _bias(bundle, first_bias, n, rows, FORMAT)
        if GATED:
            sums_2 += once * _bias(bundle, second_bias, n, rows, FORMAT)
    mask = live[:, None] & (n < rows)[None, :]
    at = split.to(tl.int64) * pairs + pair
    if GATED and ACTIVATION == "":
        to = out + at[:, None] * (2 * rows) + n[None, :]
        tl.store(to, sums_1, mask=mask)
        tl.store(to + rows, sums_2, mask=mask)
    else:
        if GATED:
            result = gated(sums_1, sums_2, ACTIVATION)
        elif ACTIVATION == "":
            result = sums_1
        else:
            result = activate(sums_1, ACTIVATION)
        tl.store(out + at[:, None] * rows + n[None, :], rounded(result, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pairs"])
def gate_splits_kernel(
    sums, out, pairs, rows, GATED: tl.constexpr, ACTIVATION: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """out[p] = act(sum over s of sums[s, p]); program (p, j): pair p, rows j ROWS onwards.

    sums: fp32 [SPLITS, pairs, rows], GATED [SPLITS, pairs, 2 rows] with gate before up. out: [pairs, rows].
    """
    pair = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = n < rows
    width = rows * 2 if GATED else rows
    first = tl.zeros([ROWS], tl.float32)
    second = tl.zeros([ROWS], tl.float32)
    for split in tl.static_range(SPLITS):
        at = sums + (split * pairs + pair) * width + n
        first += tl.load(at, mask=inside, other=0.0)
        if GATED:
            second += tl.load(at + rows, mask=inside, other=0.0)
    result = gated(first, second, ACTIVATION) if GATED else activate(first, ACTIVATION)
    tl.store(out + pair * rows + n, rounded(result, out.dtype.element_ty), mask=inside)
