"""Attention of one new token a sequence over its cached keys and values."""

from __future__ import annotations

from functools import cache

import torch

from cpu_kernels.decode_attention_kernel import combine_task, run_decode_attention, run_task
from cpu_kernels.tensors import describe, elements_of
from cpu_kernels.threads import Pool


@cache
def _tasks(dtype: torch.dtype) -> tuple[int, int]:
    elements = elements_of(dtype)
    return run_task(elements), combine_task(elements)


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    pool: Pool,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Out = round(softmax(scale q K^T) V) for each query head over all tokens; query heads g G to g G + G - 1 share
    key-value head g. Scores, exponentials and sums are fp32. The bits do not depend on the number of threads.

    Args:
        query: [B, Hq, 1, D] on the CPU, the elements of a head contiguous; bf16, fp16 or fp32.
        key: [B, Hk, S, D] of the same dtype, S > 0, Hk a divisor of Hq, the rows of a head contiguous.
        value: [B, Hk, S, V], the elements of a row contiguous.
        scale: of the scores.
        pool: the threads.
        sinks: fp32 [Hq] on the CPU, contiguous: a score of each head that has no value; None for none.

    Returns:
        [B, 1, Hq, V], contiguous.

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
    """
    batch, heads, positions, width = query.shape
    _, kv_heads, tokens, value_width = value.shape
    dtype = query.dtype
    if (
        positions != 1
        or tokens == 0
        or heads % kv_heads
        or key.shape != (batch, kv_heads, tokens, width)
        or value.shape[0] != batch
        or not (key.dtype is dtype and value.dtype is dtype and query.is_cpu and key.is_cpu and value.is_cpu)
        or not (query.stride(3) == 1 and key.stride()[2:] == (width, 1) and value.stride(3) == 1)
    ):
        raise ValueError(
            "decode_attention: expected query [B, Hq, 1, D], key [B, Hk, S, D] with contiguous heads and value "
            f"[B, Hk, S, V] of one dtype on the CPU, found {', '.join(map(describe, (query, key, value)))}"
        )
    if sinks is not None and (sinks.dtype is not torch.float32 or sinks.shape != (heads,) or not sinks.is_contiguous()):
        raise ValueError(f"decode_attention: expected sinks as contiguous fp32 [{heads}], found {describe(sinks)}")
    out = query.new_empty(batch, 1, heads, value_width)
    launcher, state = pool.launcher
    task, ending = _tasks(dtype)
    q_batch, q_head, _, _ = query.stride()
    k_batch, k_head, _, _ = key.stride()
    v_batch, v_head, v_token, _ = value.stride()
    run_decode_attention(
        launcher, state, pool.threads, task, ending, dtype.itemsize, batch, kv_heads, heads // kv_heads, tokens, width,
        value_width, query.data_ptr(), q_batch, q_head, key.data_ptr(), k_batch, k_head,
        value.data_ptr(), v_batch, v_head, v_token, out.data_ptr(), 0 if sinks is None else sinks.data_ptr(), scale,
    )  # fmt: skip
    return out
