"""Group (token, expert) pairs by expert on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_kernels.grouping_kernel import group_few_kernel, group_many_kernel
from gpu_kernels.launch import Threads, launch

FEW_PAIRS = 128
"""Up to here one program counts pairs against each other; above, one program for each expert looks at all."""

_MANY_BLOCK = 1024


@dataclass(frozen=True)
class PairGroups:
    """Pairs of one MoE step in tiles of one expert each. Pair t * top_k + i is token t's i-th expert.

    Attributes:
        order: int32 [pairs]; pairs sorted by expert, then by number. Places that no tile covers have no meaning.
        tiles: int32 [3, tile_count]: expert of each tile (-1: none), its first place in `order`, the place at which
            its expert's pairs end; the latter two have no meaning where there is no expert.
        top_k: experts of a token.
        block_tokens: most pairs of a tile.
    """

    order: torch.Tensor
    tiles: torch.Tensor
    top_k: int
    block_tokens: int

    @property
    def pairs(self) -> int:
        """Pairs, those without an expert here too."""
        return len(self.order)

    @property
    def tile_count(self) -> int:
        """Tiles, unused ones too; known without asking the device."""
        return self.tiles.shape[1]


def group_pairs(ids: torch.Tensor, table: torch.Tensor, block_tokens: int) -> PairGroups:
    """Sort pairs by expert and cut each expert's into tiles; nothing waits for the device.

    Args:
        ids: int32 or int64 [T, k], contiguous. Ids outside of the table have no expert.
        table: int64 [experts]; address of each expert's bundle, 0 for those that are not here, which get no tile.
        block_tokens: most pairs of a tile.

    Raises:
        ValueError: another shape or dtype.
    """
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64) or not ids.is_contiguous():
        raise ValueError(f"ids: expected contiguous int32 or int64 [T, k], found {ids.dtype} {tuple(ids.shape)}")
    if table.dim() != 1 or table.dtype != torch.int64 or not len(table):
        raise ValueError(f"table: expected int64 [experts], found {table.dtype} {tuple(table.shape)}")
    pairs, experts = ids.numel(), len(table)
    few = pairs <= FEW_PAIRS
    tile_count = pairs if few else pairs // block_tokens + experts
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    tiles = torch.empty(3, tile_count, dtype=torch.int32, device=ids.device)
    kernel = group_few_kernel if few else group_many_kernel
    block = max(16, 1 << (pairs - 1).bit_length()) if few and pairs else _MANY_BLOCK
    launch(
        kernel,
        (min(pairs, 1) if few else experts,),
        (ids, table, order, tiles, pairs, experts, tile_count),
        Threads(warps=4 if block <= 64 else 8),
        ids.device,
        BLOCK_TOKENS=block_tokens,
        PAIRS=block,
    )
    return PairGroups(order, tiles, ids.shape[1], block_tokens)
