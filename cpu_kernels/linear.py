"""A linear layer for few tokens, at the bandwidth of memory: y = x W^T + b with W row-major as torch has it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.compiling.compiler import direct
from cpu_kernels.linear_kernel import linear_task, run_linear, run_products
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


class Products:
    """Products of one row with several weights, each with the bits of `linear`, in fp32, into memory that stays.

    For many small ones in a row, of which all else that `linear` does is most.

    Attributes:
        dtype: of weights and rows.
        columns: K.
        found: fp32 [weights, most N], each row filled as far as its weight has rows; the last call's.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        """Make room.

        Args:
            weights: each [N, K], contiguous, with the same K, on the CPU; all of one dtype: bf16, fp16 or fp32. Their
                memory is kept.

        Raises:
            ValueError: there are none, or they are not so.
        """
        if not weights or any(
            weight.dim() != 2
            or weight.shape[1] != weights[0].shape[1]
            or weight.dtype is not weights[0].dtype
            or not (weight.is_cpu and weight.is_contiguous())
            for weight in weights
        ):
            raise ValueError(
                "Products: expected contiguous weights [N, K] of one K and dtype on the CPU, found "
                f"{', '.join(map(describe, weights)) or 'none'}"
            )
        self.dtype, self.columns = weights[0].dtype, weights[0].shape[1]
        # Of a parameter whose data somebody replaces, what was there stays.
        self._kept = [weight.detach() for weight in weights]
        self._out = torch.zeros(len(weights), max(map(len, weights)), dtype=self.dtype, device="cpu")
        self._places = np.array(
            [
                (weight.data_ptr(), len(weight), line.data_ptr())
                for weight, line in zip(self._kept, self._out, strict=True)
            ],
            np.int64,
        )
        self._widened = self._out if self.dtype is torch.float32 else self._out.float()
        self.found: npt.NDArray[np.float32] = self._widened.numpy()
        self._run, self._task = direct(run_products), _task(self.dtype)

    def compute(self, x: torch.Tensor, pool: Pool) -> None:
        """Fill `found` with the products.

        Args:
            x: K elements of the weights' dtype, contiguous, on the CPU.
            pool: the threads.

        Raises:
            ValueError: `x` is not so.
        """
        if x.dtype is not self.dtype or x.numel() != self.columns or not (x.is_cpu and x.is_contiguous()):
            raise ValueError(f"Products: expected {self.columns} contiguous {self.dtype}, found {describe(x)}")
        launcher, state = pool.launcher
        self._run(launcher, state, self._task, self.dtype.itemsize, x.data_ptr(), self._places, self.columns)
        if self._widened is not self._out:
            self._widened.copy_(self._out)
