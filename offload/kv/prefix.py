"""One sequence of a table as bytes, to save it and to have it again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.kv import KvLayout
from offload.errors import StoreCorruptError
from offload.kv.paging import Paging
from offload.kv.slots import view
from offload.kv.table import BlockTable, Layouts

Bytes = npt.NDArray[np.uint8]


def describe(table: BlockTable) -> dict[str, Any]:
    """All of a table but its bytes, as JSON has it."""
    packed = table.layouts.packed
    return {
        "plain": asdict(table.layouts.plain),
        "packed": None if packed is None else asdict(packed),
        "tokens": table.tokens,
        "sealed": table.sealed,
    }


def sizes(table: BlockTable) -> list[int]:
    """Bytes of the block in each column."""
    return [table.layout_of(column).nbytes for column in range(table.columns)]


def contents(table: BlockTable) -> Iterator[Bytes]:
    """The bytes of the first sequence's blocks, a copy of each.

    Raises:
        StorageError, StoreCorruptError: a block on disk cannot be read.
    """
    for column, nbytes in enumerate(sizes(table)):
        with table.pool.use(), table.pool.at_hand(table.blocks(0, column, column + 1)) as addresses:
            content = np.frombuffer(view(int(addresses[0]), nbytes), np.uint8).copy()
        yield content


def restored(paging: Paging, description: dict[str, Any], blocks: Iterator[Bytes]) -> BlockTable:
    """A table of one sequence from `describe` and the next of these blocks.

    Raises:
        StoreCorruptError: the blocks are cut in another way than this model's, or are too few.
        DoesNotFitError, StorageError: see `BlockTable.restore`.
    """
    plain = KvLayout(**description["plain"])
    packed = None if description["packed"] is None else KvLayout(**description["packed"])
    settings = paging.settings
    if plain.block_tokens != settings.block_tokens:
        raise StoreCorruptError(
            f"a saved prefix has blocks of {plain.block_tokens} tokens, this model's have {settings.block_tokens}"
        )
    table = paging.empty_table(Layouts(plain, packed), 1)
    tokens = int(description["tokens"])
    columns = -(-tokens // settings.block_tokens)
    table.restore(_exactly(columns, blocks), tokens, int(description["sealed"]))
    return table


def _exactly(count: int, blocks: Iterable[Bytes]) -> Iterator[Bytes]:
    done = 0
    for block in islice(blocks, count):
        done += 1
        yield block
    if done < count:
        raise StoreCorruptError(f"a saved prefix has {done} blocks where its tokens take {count}")
