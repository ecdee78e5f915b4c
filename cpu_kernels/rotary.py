"""Rotary position embedding of queries and keys in one call, rounded as tensor operations round."""

from __future__ import annotations

from functools import cache

import torch

from cpu_kernels.rotary_kernel import rotary_task, run_rotary
from cpu_kernels.tensors import describe, elements_of
from cpu_kernels.threads import Pool


@cache
def _task(dtype: torch.dtype) -> int:
    return rotary_task(elements_of(dtype))


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, shared_angles: bool, pool: Pool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate pairs (x[i], x[i + P]) of each head; what follows the 2 P rotated elements passes.

        y[i]     = round(round(x[i] cos[i]) + round(-x[i + P] sin[i]))
        y[i + P] = round(round(x[i + P] cos[j]) + round(x[i] sin[j]))     j = i with shared angles, else i + P

    Args:
        q: [B, Hq, T, D] on the CPU, the elements of a head contiguous; bf16, fp16 or fp32.
        k: [B, Hk, T, D], likewise.
        cos: [B or 1, T, P with shared angles, else 2 P], contiguous, of the same dtype.
        sin: as cos.
        shared_angles: one angle for both elements of a pair.
        pool: the threads; few positions run on the calling one.

    Returns:
        q and k rotated, as views [B, H, T, D] of contiguous [B, T, H, D].

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
    """
    batch, q_heads, positions, width = q.shape
    k_heads = k.shape[1]
    angles = cos.shape[-1]
    pairs = angles if shared_angles else angles // 2
    dtype = q.dtype
    if (
        k.shape != (batch, k_heads, positions, width)
        or cos.shape != sin.shape
        or cos.shape[:-1] not in ((batch, positions), (1, positions))
        or 2 * pairs > width
        or (not shared_angles and angles % 2)
        or not (k.dtype is dtype and cos.dtype is dtype and sin.dtype is dtype)
        or not (q.is_cpu and k.is_cpu and cos.is_cpu and sin.is_cpu)
        or not (cos.is_contiguous() and sin.is_contiguous() and q.stride(3) == 1 and k.stride(3) == 1)
    ):
        raise ValueError(
            "rotary: expected q, k [B, H, T, D] and cos, sin [B or 1, T, P] of one dtype on the CPU, heads and angles "
            f"contiguous, found {', '.join(map(describe, (q, k, cos, sin)))}"
        )
    q_out, k_out = q.new_empty(batch, positions, q_heads, width), k.new_empty(batch, positions, k_heads, width)
    launcher, state = pool.launcher
    q_batch, q_head, q_position, _ = q.stride()
    k_batch, k_head, k_position, _ = k.stride()
    run_rotary(
        launcher, state, _task(dtype), dtype.itemsize, batch, positions, width,
        cos.data_ptr(), sin.data_ptr(), 0 if cos.shape[0] == 1 else positions * angles, angles, pairs,
        0 if shared_angles else pairs,
        q.data_ptr(), q_heads, q_batch, q_head, q_position,
        k.data_ptr(), k_heads, k_batch, k_head, k_position,
        q_out.data_ptr(), k_out.data_ptr(),
    )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)
