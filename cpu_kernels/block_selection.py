"""Attention to a few blocks of a history, chosen by scores: lossy, and not a byte of the other blocks is read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.block_selection_kernel import choose_largest
from cpu_kernels.paged_attention import check_valid, paged_attention
from cpu_kernels.tensors import describe
from cpu_kernels.threads import Pool
from cpu_kernels.workspace import workspace
from formats.kv import KvLayout

Bool = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]


_DIGITS = 256
NO_MASK: Bytes = np.zeros((0, 0), np.uint8)


def choose_blocks(
    scores: torch.Tensor,
    count: int,
    always: int = 1,
    *,
    valid: Bool | None = None,
    block_tokens: int = 0,
    into: Int64 | None = None,
) -> Int64:
    """The blocks with the largest scores, the first `always` of a history among them; of equal ones the first.

    Args:
        scores: fp32 [B, Hk, C] on the CPU, contiguous.
        count: how many, those that are always chosen included.
        always: blocks from the first on; they hold the tokens that any query looks at (Xiao et al., 2024).
        valid: bool [B, C block_tokens or more], False where a token is padding; blocks of padding alone come last, and
            the first block is the first other one. None for no padding.
        block_tokens: of a block, if there is padding.
        into: int64 [B, Hk, min(count, C)] to write to; None for a new array.

    Returns:
        int64 [B, Hk, min(count, C)], ascending.

    Raises:
        ValueError: a shape, dtype or layout that does not fit.
    """
    batch, kv_heads, columns = scores.shape
    shape = batch, kv_heads, min(count, columns)
    chosen = np.empty(shape, np.int64) if into is None else into
    check_valid(valid, batch, columns * block_tokens)
    if scores.dtype is not torch.float32 or not scores.is_contiguous() or chosen.shape != shape:
        raise ValueError(
            f"choose_blocks: expected contiguous fp32 scores and room for {list(shape)}, found {describe(scores)} and "
            f"{chosen.shape}"
        )
    scratch = workspace(8 * (columns + _DIGITS))
    numbers, mask = scores.numpy(), NO_MASK if valid is None else valid.view(np.uint8)
    choose_largest(
        numbers, numbers.view(np.int32), mask, block_tokens, min(always, count), scratch[:columns],
        scratch[columns : columns + _DIGITS], chosen,
    )  # fmt: skip
    return chosen


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
    """As `paged_attention` for tokens that come after the history, over some full blocks of each key-value head.

    Args:
        query: [B, Hq, T, D].
        addresses: int64 [B, C], of a history's blocks; those that no head chose are not looked at.
        chosen: int64 [B, Hk, m], which of them each head attends to.
        layout: of the blocks.
        scale: of the scores.
        softcap: see `paged_attention`.
        pool: the threads.

    Returns:
        out fp32 [B, Hq, T, V], lse fp32 [B, Hq, T].

    Raises:
        ValueError: see `paged_attention`.
    """
    batch, kv_heads, count = chosen.shape
    lists = np.take_along_axis(addresses[:, None].repeat(kv_heads, 1), chosen, 2)
    counts = np.full((batch, kv_heads), count)
    return attend_to_lists(query, counts, lists.reshape(-1), layout, scale, softcap=softcap, pool=pool)


def attend_to_lists(
    query: torch.Tensor,
    counts: Int64,
    addresses: Int64,
    layout: KvLayout,
    scale: float,
    *,
    valid: Bool | None = None,
    softcap: float | None = None,
    into: tuple[torch.Tensor, torch.Tensor] | None = None,
    pool: Pool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of tokens to full blocks before them, of which each key-value head has a list of its own.

    Args:
        query: [n, Hq, T, D].
        counts: int64 [n, Hk], blocks of each list, maybe none.
        addresses: int64, of the blocks of all lists, one list after the other.
        layout: of the blocks.
        scale: of the scores.
        valid: bool [n, Hk, most blocks of a list times block_tokens], False where a token of a list is not seen;
            None: all are.
        softcap: see `paged_attention`.
        into: contiguous out and lse to write to; None for new ones.
        pool: the threads.

    Returns:
        out fp32 [n, Hq, T, V], lse fp32 [n, Hq, T]; of an empty list zeros and minus infinity.

    Raises:
        ValueError: see `paged_attention`.
    """
    kv_heads, new = counts.shape[1], query.shape[2]
    each = np.ascontiguousarray(counts.reshape(-1))
    sequences, tokens = len(each), each * layout.block_tokens
    shape = sequences, query.shape[1] // kv_heads, new
    # A head of a block lies as a block of one head does, so each is a sequence of its own.
    heads = np.repeat(np.tile(np.arange(kv_heads), len(counts)), each)
    out, lse = paged_attention(
        query.reshape(sequences, -1, new, query.shape[3]),
        np.concatenate([[0], np.cumsum(each)]),
        addresses + heads * layout.head_nbytes,
        tokens,
        np.zeros(sequences, np.int64),
        np.repeat(np.maximum(tokens - 1, 0)[:, None], new, 1),
        replace(layout, kv_heads=1),
        scale,
        softcap=softcap,
        valid=None if valid is None else valid.reshape(sequences, -1),
        into=None if into is None else (into[0].view(*shape, -1), into[1].view(shape)),
        pool=pool,
    )
    return out.reshape(len(counts), -1, new, layout.output_width), lse.reshape(len(counts), -1, new)


def captured_mass(part: torch.Tensor, whole: torch.Tensor) -> float:
    """The mean share of exact attention that a part of the tokens has, from lse of both."""
    return float(torch.exp(part - whole).mean())
