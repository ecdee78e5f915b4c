# mypy: allow-untyped-defs, allow-incomplete-defs
"""The weighted sum of a token's experts."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.rounding_kernel import rounded


@triton.jit(do_not_specialize=["pairs"])
def combine_kernel(
    rows, weights, base, out, pairs, top_k, hidden, BASE: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """out[t] = base[t] + sum over i of weights[t, i] (sum over s of rows[s, t top_k + i]), in fp32, in this order.

    Program (t, j): token t, columns j COLUMNS onwards. Rows of weight 0 are not read.
    """
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = n < hidden
    total = tl.zeros([COLUMNS], tl.float32)
    if BASE:
        total += tl.load(base + token * hidden + n, mask=inside, other=0.0)
    for i in range(top_k):
        # A vector of equal weights: the interpreter cannot combine a scalar comparison of floats with a mask.
        weight = tl.zeros([COLUMNS], tl.float32) + tl.load(weights + token * top_k + i)
        read = inside & (weight != 0.0)
        row = tl.zeros([COLUMNS], tl.float32)
        for split in tl.static_range(SPLITS):
            row += tl.load(rows + (split * pairs + token * top_k + i) * hidden + n, mask=read, other=0.0)
        total += weight * row
    tl.store(out + token * hidden + n, rounded(total, out.dtype.element_ty), mask=inside)
