"""A linear layer for many tokens: torch's matrix product, in fp32 where the CPU has none for 16-bit numbers.

Without instructions made for them torch multiplies bf16 and fp16 at a seventh of the speed that the CPU has in fp32
(docs/performance.md). Products of 16-bit numbers are exact in fp32, so widening first loses nothing.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

BLOCK_NBYTES = 8 << 20
"""Weights are widened in blocks of so many bytes of fp32: little memory, and still in a cache when multiplied."""


@cache
def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether torch hands matrix products of this dtype to instructions made for it."""
    if dtype is torch.float32:
        return True
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return bool(supported is not None and supported())


def linear_many(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Y = x W^T + b, rounded to x's dtype.

    Args:
        x: [..., K] on the CPU; bf16, fp16 or fp32.
        weight: [N, K] of the same dtype.
        bias: [N] of the same dtype, or None.

    Returns:
        [..., N] of the same dtype.
    """
    if multiplies_natively(x.dtype):
        return F.linear(x, weight, bias)
    rows, columns = weight.shape
    wide = x.reshape(-1, columns).float()
    out = x.new_empty(len(wide), rows)
    step = max(16, BLOCK_NBYTES // (4 * columns))
    for first in range(0, rows, step):
        block = slice(first, first + step)
        out[:, block] = F.linear(wide, weight[block].float(), None if bias is None else bias[block].float())
    return out.view(*x.shape[:-1], rows)
