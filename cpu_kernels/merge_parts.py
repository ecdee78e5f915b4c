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
        out: fp32 [B, parts, H, T, V] on the CPU; each part contiguous, of one without keys anything.
        lse: fp32 [B, parts, H, T], natural logarithm; minus infinity of a part without keys. Parts lie in the order of
            those of `out`.
        sinks: [H], a score of each head that takes weight and has no value; None for none.
        pool: the threads; little work runs on the calling one.

    Returns:
        fp32 [B, H, T, V]; zeros where a query sees nothing.

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
    """
    batch, count, heads, positions, columns = out.shape
    steps, of_lse = _steps(out, heads * positions * columns), _steps(lse, heads * positions)
    if (
        lse.shape != out.shape[:4]
        or not (out.dtype is torch.float32 is lse.dtype)
        or not (out.is_cpu and lse.is_cpu and steps is not None and steps == of_lse)
        or (sinks is not None and sinks.shape != (heads,))
    ):
        raise ValueError(
            "merge_parts: expected fp32 out [B, parts, H, T, V] and lse [B, parts, H, T] on the CPU, of contiguous "
            f"parts in the same order, and sinks [H] or None, found {describe(out)}, {describe(lse)} and "
            f"{None if sinks is None else describe(sinks)}"
        )
    result = out.new_empty(batch, heads, positions, columns)
    scores = None if sinks is None else sinks.float().contiguous()
    launcher, state = pool.launcher
    run_merge(
        launcher, state, merge_task(), out.data_ptr(), lse.data_ptr(), 0 if scores is None else scores.data_ptr(),
        result.data_ptr(), batch, count, heads, positions, columns, *steps,
    )  # fmt: skip
    return result


def _steps(parts: torch.Tensor, elements: int) -> tuple[int, int] | None:
    """How far sequences and parts [B, parts, H, T, ...] are apart, in rows of [B, parts, H, T].

    Args:
        parts: see above.
        elements: of a part.

    Returns:
        None where a part is not contiguous, or they are not whole parts apart.
    """
    if 0 in parts.shape:
        return 0, 0
    apart = [0 if size == 1 else stride for size, stride in zip(parts.shape[:2], parts.stride()[:2], strict=True)]
    if not parts[0, 0].is_contiguous() or any(stride % elements for stride in apart):
        return None
    rows = parts.shape[2] * parts.shape[3]
    return rows * (apart[0] // elements), rows * (apart[1] // elements)
