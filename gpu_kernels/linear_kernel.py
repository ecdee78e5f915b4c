# mypy: allow-untyped-defs, allow-incomplete-defs
"""A linear layer with packed weights."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.rounding_kernel import rounded
from gpu_kernels.weights_kernel import multiply_add, no_sums, tokens_first


@triton.jit(do_not_specialize=["tokens"])
def packed_linear_kernel(
    x, codes, scales, bias, out, tokens, rows, columns, x_stride,
    FORMAT: tl.constexpr, DOT: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr, SCALE_WEIGHTS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[s, t, n] = sum over the s-th part of k of x[t, k] W[n, k] + b[n]; the bias is in the first part.

    Program (i, j, s): tokens i TOKENS onwards, rows j ROWS onwards, part s of SPLITS. x: rows x_stride elements
    apart. codes, scales: as `formats.packed.MatrixLayout(rows, columns, FORMAT)` has them. out: row-major.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS
    split = tl.program_id(2)
    live = (token < tokens)[:, None]
    inputs = x + token.to(tl.int64)[:, None] * x_stride
    steps = (columns + COLUMNS - 1) // COLUMNS
    part = (steps + SPLITS - 1) // SPLITS
    sums = no_sums(FORMAT, SCALE_WEIGHTS, TOKENS, ROWS)
    for step in range(split * part, tl.minimum(split * part + part, steps)):
        column = step * COLUMNS
        k = column + tl.arange(0, COLUMNS)[None, :]
        block = tl.load(inputs + k, mask=live & (k < columns), other=0.0).to(DOT)
        sums = multiply_add(
            sums, block, codes, scales, row, column, rows, columns, FORMAT, x.dtype.element_ty, DOT, SCALE_WEIGHTS,
            ROWS, COLUMNS,
        )  # fmt: skip
    sums = tokens_first(sums, FORMAT, SCALE_WEIGHTS)
    n = row + tl.arange(0, ROWS)
    if BIAS:
        sums += (split == 0).to(tl.float32) * tl.load(bias + n, mask=n < rows, other=0.0)[None, :]
    at = (split.to(tl.int64) * tokens + token)[:, None] * rows + n[None, :]
    tl.store(out + at, rounded(sums, out.dtype.element_ty), mask=live & (n < rows)[None, :])
