"""What is written into blocks, in whatever memory they are: tokens, packed blocks, bytes as they come."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.kv_blocks import pack_block, write_tokens
from formats.kv import KvLayout

if TYPE_CHECKING:
    from offload.kv.pool import BlockPool

Int64 = npt.NDArray[np.int64]


def write(
    pool: BlockPool,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    blocks: Int64,
    first_tokens: Int64,
    layout: KvLayout,
) -> None:
    """Write consecutive tokens of each sequence into plain blocks. The caller holds the pool's lock.

    Args:
        pool: whose blocks.
        keys: [sequences, heads, T, key width], on any device.
        values: [sequences, heads, T, value width]; None where they are part of the keys.
        blocks: int64 [sequences, n], numbers, in the order of their tokens.
        first_tokens: int64 [sequences], where in its blocks each sequence's first new token goes.
        layout: of the blocks.
    """
    rows, count = blocks.shape
    above = pool.is_above[blocks]
    if above.any() and not above.all():
        _write_one_by_one(pool, keys, values, blocks, first_tokens, layout)
        return
    addresses = np.ascontiguousarray(pool.addresses[blocks]).reshape(-1)
    told = np.arange(rows + 1) * count, addresses, first_tokens, layout
    if above.all() and pool.above is not None:
        pool.above.accelerator.write_tokens(keys, values, *told)
    else:
        write_tokens(keys.cpu(), None if values is None else values.cpu(), *told)


def _write_one_by_one(
    pool: BlockPool,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    blocks: Int64,
    first_tokens: Int64,
    layout: KvLayout,
) -> None:
    size, new = layout.block_tokens, keys.shape[2]
    for row, start in enumerate(first_tokens.tolist()):
        for column in range(blocks.shape[1]):
            first, end = max(start, column * size), min(start + new, (column + 1) * size)
            if first >= end:
                continue
            own = slice(row, row + 1), slice(None), slice(first - start, end - start)
            place = np.array([first - column * size])
            write(
                pool, keys[own], None if values is None else values[own], blocks[row : row + 1, column : column + 1],
                place, layout,
            )  # fmt: skip


def pack(pool: BlockPool, sources: Int64, source_layout: KvLayout, targets: Int64, layout: KvLayout) -> None:
    """Pack full plain blocks into quantised ones, each pair in memories of any kind. The caller holds the pool's lock.

    Args:
        pool: whose blocks.
        sources: int64 [n], numbers of the plain blocks.
        source_layout: of these.
        targets: int64 [n], numbers of the quantised ones.
        layout: of these.

    Raises:
        StorageError, StoreCorruptError: a plain block cannot be read.
    """
    above = pool.is_above[sources] & pool.is_above[targets]
    if above.any():
        assert pool.above is not None
        addresses = pool.addresses
        pool.above.accelerator.pack_blocks(addresses[sources[above]], source_layout, addresses[targets[above]], layout)
    for source, target in zip(sources[~above], targets[~above].tolist(), strict=True):
        with pool.at_hand(np.array([source])) as found:
            if pool.is_above[target]:
                content = np.empty(layout.nbytes, np.uint8)
                pack_block(int(found[0]), source_layout, content.ctypes.data, layout)
                fill(pool, target, content)
            else:
                pack_block(int(found[0]), source_layout, int(pool.addresses[target]), layout)


def fill(pool: BlockPool, block: int, content: npt.NDArray[np.uint8]) -> None:
    """Give a block its bytes, uint8 [n], contiguous. The caller holds the pool's lock."""
    address = int(pool.addresses[block])
    if pool.is_above[block]:
        assert pool.above is not None
        pool.above.accelerator.copy_up(content, address)
    else:
        ctypes.memmove(address, content.ctypes.data, content.nbytes)
