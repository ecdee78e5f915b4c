"""A linear layer for many tokens: torch's matrix product where the CPU has one for the dtype, else a kernel's in fp32.

Without instructions made for them torch multiplies bf16 and fp16 at a seventh of the speed that the CPU has in fp32
(docs/performance.md). Products of 16-bit numbers are exact in fp32, so widening first loses nothing.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from cpu_kernels.panel_mlp import multiplies_pairs, panel_linear
from cpu_kernels.threads import Pool


@cache
def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether torch hands matrix products of this dtype to instructions made for it."""
    if dtype is torch.float32:
        return True
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return bool(supported is not None and supported())


def takes_panels(dtype: torch.dtype) -> bool:
    """Whether `panel_mlp` computes experts of this dtype for many tokens faster than torch does."""
    return dtype is torch.float32 or not multiplies_natively(dtype) or (dtype is torch.bfloat16 and multiplies_pairs())


def linear_many(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pool: Pool) -> torch.Tensor:
    """Y = x W^T + b, rounded to x's dtype.

    Args:
        x: [..., K] on the CPU; bf16, fp16 or fp32.
        weight: [N, K], contiguous, of the same dtype.
        bias: [N], contiguous, of the same dtype, or None.
        pool: the threads of the kernel.

    Returns:
        [..., N] of the same dtype.

    Raises:
        ValueError: a shape, dtype, device or layout that the kernel does not take.
    """
    return F.linear(x, weight, bias) if multiplies_natively(x.dtype) else panel_linear(x, weight, bias, pool)
