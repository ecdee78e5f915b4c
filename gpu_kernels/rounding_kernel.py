# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rounding of fp32 to the dtype of computing."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.launch import interpreting

_TRUNCATES = tl.constexpr(interpreting())


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """An fp32 value as DTYPE, to the nearest, ties to even.

    That is what a cast does on a GPU. The interpreter cuts bf16 off instead, so there the bits are rounded first.
    """
    if _TRUNCATES and tl.bfloat16 == DTYPE:
        bits = value.to(tl.int32, bitcast=True)
        # What is cut off is none: of denormals the interpreter keeps other bits.
        up = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        value = tl.where(tl.abs(value) < float("inf"), up, value)
    return value.to(DTYPE)
