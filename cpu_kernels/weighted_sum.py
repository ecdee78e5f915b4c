"""Each token's experts, weighted and summed."""

from __future__ import annotations

import torch

from cpu_kernels.tensors import describe
from cpu_kernels.threads import Pool
from cpu_kernels.weighted_sum_kernel import run_weighted_sum, weighted_sum_task


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
