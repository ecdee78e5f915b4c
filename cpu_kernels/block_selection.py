"""Attention to a few blocks of a history, chosen by landmarks: lossy, and not a byte of the other blocks is read.

A block's landmarks are the smallest and the largest number of each channel of its keys. With them a query's largest
possible score in a block is known without its keys (Quest, Tang et al., 2024):

    q · k <= sum over channels of max(q_c smallest_c, q_c largest_c)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.paged_attention import paged_attention
from cpu_kernels.threads import Pool
from formats.kv import KvLayout

Int64 = npt.NDArray[np.int64]


def landmarks(keys: torch.Tensor, block_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest key of each block, channel by channel.

    Args:
        keys: [..., tokens, D], tokens a multiple of block_tokens.
        block_tokens: of a block.

    Returns:
        fp32 [..., blocks, D], twice.
    """
    blocks = keys.float().reshape(*keys.shape[:-2], -1, block_tokens, keys.shape[-1])
    return blocks.amin(-2), blocks.amax(-2)


def largest_scores(query: torch.Tensor, smallest: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """A bound on the scores, before scaling, that any of the query heads of a key-value head has in each block.

    Args:
        query: [B, Hq, 1, D].
        smallest: fp32 [B, Hk, C, D], of `landmarks`.
        largest: fp32 [B, Hk, C, D].

    Returns:
        fp32 [B, Hk, C].
    """
    batch, kv_heads = smallest.shape[:2]
    q = query.float().reshape(batch, kv_heads, -1, query.shape[3])
    return (q.clamp_min(0) @ largest.mT + q.clamp_max(0) @ smallest.mT).amax(2)


def choose_blocks(scores: torch.Tensor, count: int, always: int = 1) -> Int64:
    """The blocks with the largest scores, the first `always` of a history among them.

    Args:
        scores: [B, Hk, C].
        count: how many, those that are always chosen included.
        always: blocks from the first on; they hold the tokens that any query looks at (Xiao et al., 2024).

    Returns:
        int64 [B, Hk, min(count, C)], ascending.
    """
    columns = scores.shape[2]
    favoured = scores.clone()
    favoured[..., : min(always, count)] = torch.inf
    chosen = favoured.topk(min(count, columns), dim=2).indices
    return np.ascontiguousarray(chosen.sort(dim=2).values.numpy())


def attend_to_blocks(
    query: torch.Tensor,
    addresses: Int64,
    chosen: Int64,
    layout: KvLayout,
    scale: float,
    *,
    softcap: float | None = None,
    pool: Pool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `paged_attention` for one new token, over some full blocks of each key-value head.

    Args:
        query: [B, Hq, 1, D].
        addresses: int64 [B, C], of a history's blocks; those that no head chose are not looked at.
        chosen: int64 [B, Hk, m], which of them each head attends to.
        layout: of the blocks.
        scale: of the scores.
        softcap: see `paged_attention`.
        pool: the threads.

    Returns:
        out fp32 [B, Hq, 1, V], lse fp32 [B, Hq, 1].

    Raises:
        ValueError: see `paged_attention`.
    """
    batch, kv_heads, count = chosen.shape
    # A head of a block lies as a block of one head does, so each is a sequence of its own.
    lists = np.take_along_axis(addresses[:, None].repeat(kv_heads, 1), chosen, 2)
    lists += np.arange(kv_heads)[None, :, None] * layout.head_nbytes
    sequences = batch * kv_heads
    tokens = count * layout.block_tokens
    out, lse = paged_attention(
        query.reshape(sequences, -1, 1, query.shape[3]),
        np.arange(sequences + 1) * count,
        np.ascontiguousarray(lists.reshape(-1)),
        np.full(sequences, tokens),
        np.zeros(sequences, np.int64),
        np.full((sequences, 1), max(tokens - 1, 0)),
        replace(layout, kv_heads=1),
        scale,
        softcap=softcap,
        pool=pool,
    )
    return out.reshape(batch, -1, 1, layout.output_width), lse.reshape(batch, -1, 1)


def captured_mass(part: torch.Tensor, whole: torch.Tensor) -> float:
    """The mean share of exact attention that a part of the tokens has, from lse of both."""
    return float(torch.exp(part - whole).mean())
