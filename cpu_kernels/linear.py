"""A linear layer for few tokens, at the bandwidth of memory: y = x W^T + b with W row-major as torch has it."""

from __future__ import annotations

from functools import cache

import torch

from cpu_kernels.linear_kernel import linear_task, run_linear
from cpu_kernels.tensors import describe, elements_of
from cpu_kernels.threads import Pool

MOST_TOKENS = 8
"""For so many tokens the kernel is meant: it reads weights once, at memory bandwidth. It computes any number."""


@cache
def _task(dtype: torch.dtype) -> int:
    return linear_task(elements_of(dtype))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pool: Pool) -> torch.Tensor:
    """Y = round(x W^T + b), sums and bias in fp32; see `simd` for the order of sums and their error.

    The bits depend neither on the number of threads nor on which tokens share the call.

    Args:
        x: [..., K] on the CPU, contiguous; bf16, fp16 or fp32.
        weight: [N, K], contiguous, of the same dtype.
        bias: [N], contiguous, of the same dtype, or None.
        pool: the threads.

    Returns:
        [..., N] of the same dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
    """
    rows, columns = weight.shape
    dtype = x.dtype
    if (
        x.shape[-1] != columns
        or weight.dtype is not dtype
        or not (x.is_cpu and weight.is_cpu and x.is_contiguous() and weight.is_contiguous())
        or (bias is not None and (bias.dtype is not dtype or bias.shape != (rows,) or not bias.is_contiguous()))
    ):
        raise ValueError(
            "linear: expected contiguous x [..., K], weight [N, K] and bias [N] of one dtype on the CPU, found "
            f"{describe(x)}, {describe(weight)}, {'none' if bias is None else describe(bias)}"
        )
    out = x.new_empty((*x.shape[:-1], rows))
    launcher, state = pool.launcher
    run_linear(
        launcher, state, _task(dtype), dtype.itemsize, x.data_ptr(), x.numel() // columns, weight.data_ptr(),
        0 if bias is None else bias.data_ptr(), rows, columns, out.data_ptr(),
    )  # fmt: skip
    return out
