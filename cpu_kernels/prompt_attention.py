"""Attention of many new tokens: their keys and values laid out in blocks for the call, then the paged kernel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.kv_blocks import write_tokens
from cpu_kernels.paged_attention import paged_attention
from cpu_kernels.tensors import FORMAT_OF_DTYPE, describe
from cpu_kernels.threads import Pool, shared_pool
from formats.kv import KvLayout

_ALIGNMENT_BYTES = 64
_SOME_TOKENS = 16


def compile_prompt_attention(dtype: torch.dtype) -> None:
    """Compile what a dtype needs, or load it from Numba's cache; calls do so on first use otherwise."""
    tensor = torch.zeros(1, 1, _SOME_TOKENS, 16, dtype=dtype, device="cpu")
    prompt_attention(tensor, tensor, tensor, 1.0, pool=shared_pool(1))


def prompt_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    valid: npt.NDArray[np.bool_] | None = None,
    pool: Pool,
) -> torch.Tensor:
    """Out = round(softmax(scale q K^T) V), causal, of the last T of S tokens; query heads g G to g G + G - 1 share
    key-value head g. Scores, exponentials and sums are fp32. The bits do not depend on the number of threads.

    The blocks of one call take S * Hk * (D + V) elements beside the result in fp32.

    Args:
        query: [B, Hq, T, D] on the CPU; bf16, fp16 or fp32.
        key: [B, Hk, S, D] of the same dtype, S >= T, Hk a divisor of Hq, the elements of a row contiguous.
        value: [B, Hk, S, V], likewise.
        scale: of the scores.
        valid: bool [B, S], False where a token is padding, which nothing sees; None: none is.
        pool: the threads.

    Returns:
        [B, T, Hq, V] of the query's dtype, contiguous; zeros for a query that sees nothing.

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
    """
    batch, _, new, width = query.shape
    _, kv_heads, tokens, value_width = value.shape
    dtype = query.dtype
    if (
        dtype not in FORMAT_OF_DTYPE
        or new > tokens
        or key.shape != (batch, kv_heads, tokens, width)
        or not (key.dtype is dtype and value.dtype is dtype and key.is_cpu and value.is_cpu)
    ):
        raise ValueError(
            "prompt_attention: expected query [B, Hq, T, D], key [B, Hk, S, D] and value [B, Hk, S, V] of one dtype "
            f"on the CPU, T at most S, found {', '.join(map(describe, (query, key, value)))}"
        )
    layout = KvLayout(FORMAT_OF_DTYPE[dtype], kv_heads, width, value_width)
    blocks = -(-tokens // layout.block_tokens)
    storage = torch.empty(batch * blocks * layout.nbytes + _ALIGNMENT_BYTES, dtype=torch.uint8, device="cpu")
    start = storage.data_ptr() + -storage.data_ptr() % _ALIGNMENT_BYTES
    addresses = start + layout.nbytes * np.arange(batch * blocks, dtype=np.int64)
    offsets = blocks * np.arange(batch + 1, dtype=np.int64)
    firsts = np.zeros(batch, np.int64)
    write_tokens(key, value, offsets, addresses, firsts, layout)
    positions = np.tile(np.arange(tokens - new, tokens, dtype=np.int64), (batch, 1))
    lengths = np.full(batch, tokens, np.int64)
    out, _ = paged_attention(
        query, offsets, addresses, lengths, firsts, positions, layout, scale, valid=valid, pool=pool
    )  # fmt: skip
    rounded = torch.empty(batch, new, out.shape[1], value_width, dtype=dtype, device="cpu")
    return rounded.copy_(out.transpose(1, 2))
