# mypy: allow-untyped-defs, allow-incomplete-defs
"""Pairs grouped by expert on the device, so that the host need not know the routing."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _keys(ids, table, at, pairs, experts):
    """Expert of each pair; `experts` for pairs that have none here."""
    expert = tl.load(ids + at, mask=at < pairs, other=-1).to(tl.int32)
    known = (expert >= 0) & (expert < experts)
    here = tl.load(table + expert, mask=known, other=0) != 0
    return tl.where(known & here, expert, experts)


_VARYING = ["pairs", "experts", "tile_count"]
"""From step to step: no reason to compile again."""


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=["ids", "table", "order", "tiles"])
def group_few_kernel(
    ids, table, order, tiles, pairs, experts, tile_count, BLOCK_TOKENS: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """One program for up to PAIRS pairs (a power of two): every pair counts those before it.

    order[p]: p-th pair, sorted by expert, then by number. tiles[0..2][i]: expert of tile i, its first and the
    expert's end place in `order`; expert -1 for tiles past the last.
    """
    own = tl.arange(0, PAIRS)
    key = _keys(ids, table, own, pairs, experts)
    mine, theirs = key[:, None], key[None, :]
    same = (mine == theirs) & (own < pairs)[None, :]
    before = same & (own[None, :] < own[:, None])
    place = tl.sum(before.to(tl.int32), 1)
    rank = place + tl.sum(((theirs < mine) & (own < pairs)[None, :]).to(tl.int32), 1)
    count = tl.sum(same.to(tl.int32), 1)
    tl.store(order + rank, own, mask=own < pairs)
    starts = (place % BLOCK_TOKENS == 0) & (key < experts)
    # Tiles of smaller experts: each has as many as its first pair says; and those of the same expert before.
    first_of_other = tl.sum((same & (own[:, None] < own[None, :])).to(tl.int32), 0) == 0
    tiles_of_other = tl.where(
        first_of_other & (key < experts), (tl.sum(same.to(tl.int32), 0) + BLOCK_TOKENS - 1) // BLOCK_TOKENS, 0
    )
    lower = tl.sum(tl.where(theirs < mine, tiles_of_other[None, :], 0), 1)
    tile = lower + place // BLOCK_TOKENS
    tl.store(tiles + tile, key, mask=starts)
    tl.store(tiles + tile_count + tile, rank, mask=starts)
    tl.store(tiles + 2 * tile_count + tile, rank - place + count, mask=starts)
    used = tl.sum(tiles_of_other, 0)
    tl.store(tiles + own, -1, mask=(own >= used) & (own < tile_count))


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=["ids", "table", "order", "tiles"])
def group_many_kernel(
    ids, table, order, tiles, pairs, experts, tile_count, BLOCK_TOKENS: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """One program for each expert e; PAIRS are looked at at a time. What is written is as in `group_few_kernel`.

    With s pairs of smaller experts and c of its own, e has the tiles s // BLOCK_TOKENS + e up to
    (s + c) // BLOCK_TOKENS + e + 1, which is enough for its pairs and leaves the next expert's alone. Unused ones
    are -1. No program has to know how many tiles others have.
    """
    expert = tl.program_id(0)
    lane = tl.arange(0, PAIRS)
    lower = tl.zeros([PAIRS], tl.int32)
    own = tl.zeros([PAIRS], tl.int32)
    for start in range(0, pairs, PAIRS):
        key = _keys(ids, table, start + lane, pairs, experts)
        lower += (key < expert).to(tl.int32)
        own += (key == expert).to(tl.int32)
    first = tl.sum(lower, 0)
    count = tl.sum(own, 0)
    written = first
    for start in range(0, pairs, PAIRS):
        mine = (_keys(ids, table, start + lane, pairs, experts) == expert).to(tl.int32)
        tl.store(order + written + tl.cumsum(mine, 0) - 1, start + lane, mask=mine != 0)
        written += tl.sum(mine, 0)
    base = first // BLOCK_TOKENS + expert
    next_base = tl.where(expert == experts - 1, tile_count, (first + count) // BLOCK_TOKENS + expert + 1)
    for tile_from in range(base, next_base, PAIRS):
        tile = tile_from + lane
        place = first + (tile - base) * BLOCK_TOKENS
        inside = tile < next_base
        tl.store(tiles + tile, tl.where(place < first + count, expert, -1), mask=inside)
        tl.store(tiles + tile_count + tile, place, mask=inside)
        tl.store(tiles + 2 * tile_count + tile, first + count, mask=inside)
