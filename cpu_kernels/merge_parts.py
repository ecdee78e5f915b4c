"""Attention over all keys from attention over parts of them, wherever each was computed."""

from __future__ import annotations

import torch

from cpu_kernels.merge_parts_kernel import merge_task, run_merge
from cpu_kernels.tensors import describe
from cpu_kernels.threads import Pool


def merge_parts(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None, pool: Pool) -> torch.Tensor:
    """Parts weighted by the exponential of their log-sum-exp, added in their order, as in flash decoding.

    Source: Dao et al., 2023. Bits do not depend on the number of threads.

    Args:
        out: fp32 [B, parts, H, T, V] on the CPU, contiguous; of a part without keys anything.
        lse: fp32 [B, parts, H, T], contiguous, natural logarithm; minus infinity of a part without keys.
        sinks: [H], a score of each head that takes weight and has no value; None for none.
        pool: the threads; little work runs on the calling one.

    Returns:
        fp32 [B, H, T, V]; zeros where a query sees nothing.

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
    """
    batch, count, heads, positions, columns = out.shape
    if (
        lse.shape != out.shape[:4]
        or not (out.dtype is torch.float32 is lse.dtype)
        or not (out.is_cpu and lse.is_cpu and out.is_contiguous() and lse.is_contiguous())
        or (sinks is not None and sinks.shape != (heads,))
    ):
        raise ValueError(
            "merge_parts: expected contiguous fp32 out [B, parts, H, T, V] and lse [B, parts, H, T] on the CPU and "
            f"sinks [H] or None, found {describe(out)}, {describe(lse)} and "
            f"{None if sinks is None else describe(sinks)}"
        )
    result = out.new_empty(batch, heads, positions, columns)
    scores = None if sinks is None else sinks.float().contiguous()
    launcher, state = pool.launcher
    run_merge(
        launcher, state, merge_task(), out.data_ptr(), lse.data_ptr(), 0 if scores is None else scores.data_ptr(),
        result.data_ptr(), batch, count, heads, positions, columns,
    )  # fmt: skip
    return result
