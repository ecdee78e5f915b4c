"""Attention over parts of a KV cache, to be merged with parts that other devices computed."""

from __future__ import annotations

import torch

from gpu_kernels.attention_kernel import attention_partial_kernel, merge_kernel
from gpu_kernels.launch import Threads, dot_type, launch, processors

_KEYS = 64
_FEW_QUERIES = 16
_MANY_QUERIES = 64
_MOST_PARTS = 32
_SMALLEST_PART_KEYS = 256


def attention_partial(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    first_query: int = 0,
    causal: bool = True,
    window: int = 0,
    parts: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q over k, v in parts, each normalised over its own keys (flash decoding, Dao et al. 2023).

    Query i of a sequence stands at position first_query + i, counted from its first key given here. It sees keys
    j < length, with `causal` those with j <= position, with window > 0 those with j > position - window.

    Args:
        q: [B, Hq, Q, D], last axis contiguous: bf16, fp16 or fp32.
        k: [B, Hkv, S, D], likewise, same dtype; Hq is a multiple of Hkv.
        v: [B, Hkv, S, Dv], likewise.
        lengths: int32 [B]; keys that each sequence has, at most S. Read on the device.
        scale: of scores.
        first_query: see above; negative where the keys are later than the queries.
        causal: see above.
        window: see above; 0 for none.
        parts: to cut the keys into; None for as many as fill the device.

    Returns:
        out: fp32 [P, B, Hq, Q, Dv].
        lse: fp32 [P, B, Hq, Q], natural logarithm; -inf where a part sees no key, whose row of `out` is 0.

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    batch, heads, queries, depth, value = _check(q, k, v, lengths)
    group, keys = heads // k.shape[1], k.shape[2]
    block = _FEW_QUERIES if group * queries <= _FEW_QUERIES else _MANY_QUERIES
    blocks = -(-group * queries // block)
    if parts is None:
        parts = _parts(batch * k.shape[1] * blocks, keys, processors(q.device))
    out = torch.empty(parts, batch, heads, queries, value, dtype=torch.float32, device=q.device)
    lse = torch.empty(parts, batch, heads, queries, dtype=torch.float32, device=q.device)
    strides = [tensor.stride(axis) for tensor in (q, k, v) for axis in range(3)]
    wide = max(depth, value) > 128 or q.element_size() == 4
    launch(
        attention_partial_kernel,
        (batch, k.shape[1], blocks * parts),
        (q, k, v, lengths, out, lse, queries, keys, group, first_query, window, scale, *strides),
        Threads(warps=8 if block == _MANY_QUERIES and max(depth, value) > 64 else 4, stages=1 if wide else 2),
        q.device,
        CAUSAL=causal,
        DOT=dot_type(q.dtype),
        PARTS=parts,
        HEAD=depth,
        QUERIES=block,
        KEYS=_KEYS // 2 if wide else _KEYS,
        DEPTH=_power_of_two(depth),
        VALUES=_power_of_two(value),
        VALUE=value,
    )
    return out, lse


def merge_attention(
    parts: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention over the keys of all parts together gives, whichever device each was computed on.

    Args:
        parts: fp32 [P, ..., Dv], contiguous.
        lse: fp32 [P, ...], contiguous, natural logarithm.
        dtype: of the result.

    Returns:
        out: [..., Dv]; 0 where no part saw a key.
        lse: fp32 [...].

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    count, *shape, size = parts.shape
    if (
        not count
        or lse.shape != parts.shape[:-1]
        or parts.dtype != torch.float32
        or lse.dtype != torch.float32
        or not (parts.is_contiguous() and lse.is_contiguous())
    ):
        raise ValueError(
            f"expected contiguous fp32 parts [P, ..., D] and lse [P, ...], found {parts.dtype} {tuple(parts.shape)} "
            f"and {lse.dtype} {tuple(lse.shape)}"
        )
    out = torch.empty(*shape, size, dtype=dtype, device=parts.device)
    merged = torch.empty(*shape, dtype=torch.float32, device=parts.device)
    rows = merged.numel()
    launch(
        merge_kernel,
        (rows,),
        (parts, lse, out, merged, count, rows, size),
        Threads(warps=1 if size <= 128 else 4),
        parts.device,
        COLUMNS=_power_of_two(size),
    )
    return out, merged


def _parts(programs: int, keys: int, processors: int) -> int:
    wanted = max(1, 2 * processors // max(programs, 1))
    return max(1, min(wanted, keys // _SMALLEST_PART_KEYS, _MOST_PARTS))


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> tuple[int, int, int, int, int]:
    fits = (
        q.dim() == k.dim() == v.dim() == 4
        and q.dtype == k.dtype == v.dtype
        and q.shape[0] == k.shape[0] == v.shape[0]
        and k.shape[1:3] == v.shape[1:3]
        and q.shape[3] == k.shape[3]
        and q.shape[1] % k.shape[1] == 0
        and all(tensor.stride(3) == 1 for tensor in (q, k, v))
        and lengths.dtype == torch.int32
        and lengths.shape == q.shape[:1]
    )
    if not fits:
        found = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (q, k, v, lengths))
        raise ValueError(
            "attention: expected q [B, Hq, Q, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] of one dtype, last axis "
            f"contiguous, and int32 lengths [B]; found {found}"
        )
    batch, heads, queries, depth = q.shape
    return batch, heads, queries, depth, v.shape[3]
