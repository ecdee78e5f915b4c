"""Each token's experts, weighted and summed: all at once, or some experts after the others."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.compiling.compiler import prepare
from cpu_kernels.tensors import describe
from cpu_kernels.threads import Pool
from cpu_kernels.weighted_sum_kernel import add_weighted_task, run_add_weighted, run_weighted_sum, weighted_sum_task


def compile_sums() -> None:
    """Compile the kernels, or load them from Numba's cache; calls do so on first use otherwise."""
    weighted_sum_task()
    add_weighted_task()
    prepare(run_weighted_sum)
    prepare(run_add_weighted)


def weighted_sum(outputs: torch.Tensor, weights: torch.Tensor, pool: Pool) -> torch.Tensor:
    """sum[t] = weights[t, 0] outputs[t k] + weights[t, 1] outputs[t k + 1] + ... in fp32, from left to right.

    Args:
        outputs: fp32 [T k, H] on the CPU, contiguous.
        weights: fp32 [T, k], contiguous.
        pool: the threads; few tokens run on the calling one.

    Returns:
        fp32 [T, H].

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
    """
    tokens, top_k = weights.shape
    if (
        outputs.dim() != 2
        or outputs.shape[0] != tokens * top_k
        or not (outputs.dtype is torch.float32 is weights.dtype)
        or not (outputs.is_cpu and weights.is_cpu and outputs.is_contiguous() and weights.is_contiguous())
    ):
        raise ValueError(
            "weighted_sum: expected contiguous fp32 outputs [T k, H] and weights [T, k] on the CPU, found "
            f"{describe(outputs)} and {describe(weights)}"
        )
    out = outputs.new_empty(tokens, outputs.shape[1])
    launcher, state = pool.launcher
    run_weighted_sum(
        launcher, state, weighted_sum_task(), outputs.data_ptr(), weights.data_ptr(), tokens, top_k, outputs.shape[1],
        out.data_ptr(),
    )  # fmt: skip
    return out


def add_weighted(
    sums: torch.Tensor,
    outputs: torch.Tensor,
    weights: torch.Tensor,
    rows: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int64],
    pool: Pool,
) -> None:
    """sums[tokens[p]] += weights.flat[rows[p]] outputs[p] in fp32 for each pair p, in ascending order of p.

    Bits do not depend on the number of threads.

    Args:
        sums: fp32 [T, H] on the CPU, contiguous.
        outputs: fp32 [P, H], contiguous.
        weights: fp32 [T, k], contiguous.
        rows: int64 [P], places in the flattened weights.
        tokens: int64 [P], rows of `sums`.
        pool: the threads.

    Raises:
        ValueError: a shape, dtype, device, layout or index that does not fit.
    """
    tensors = (sums, outputs, weights)
    if (
        any(one.dtype is not torch.float32 or not one.is_cpu or not one.is_contiguous() for one in tensors)
        or sums.dim() != 2
        or outputs.shape != (len(rows), sums.shape[1])
        or rows.shape != tokens.shape
        or (len(rows) and int(rows.max()) >= weights.numel())
    ):
        raise ValueError(
            "add_weighted: expected contiguous fp32 sums [T, H], outputs [P, H] and weights on the CPU and P rows and "
            f"tokens, found {describe(sums)}, {describe(outputs)}, {describe(weights)}, {len(rows)} and {len(tokens)}"
        )
    launcher, state = pool.launcher
    if not run_add_weighted(
        launcher, state, add_weighted_task(), sums.data_ptr(), sums.shape[0], outputs.data_ptr(), weights.data_ptr(),
        np.ascontiguousarray(rows, np.int64), np.ascontiguousarray(tokens, np.int64), sums.shape[1],
    ):  # fmt: skip
        raise ValueError(f"add_weighted: a row or token below 0, or a token that is not one of {sums.shape[0]}")
