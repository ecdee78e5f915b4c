"""Memory that a step of decode takes beside what is there: none that grows with the history, wherever blocks lie."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from formats.kv import KvLayout
from offload.kv.attention import attend_few
from offload.kv.pool import BlockPool
from offload.kv.sparsity.base import TableSparsity
from offload.kv.sparsity.h2o import H2o
from offload.kv.sparsity.snapkv import SnapKv
from offload.kv.sparsity.top_k import TopK
from offload.kv.table import BlockTable, Layouts
from tests.kv.allocations import measured
from tests.kv.tables import HEADS, SETTINGS, WIDTH, small_pool

SIZE = SETTINGS.block_tokens
PLAIN = KvLayout("fp32", HEADS, WIDTH, WIDTH, SIZE)
PACKED = KvLayout("int8", HEADS, WIDTH, WIDTH, SIZE)
LATENT = KvLayout("fp32", 1, 24, 0, SIZE, 16)
FORMS = {"plain": Layouts(PLAIN, None), "int8": Layouts(PLAIN, PACKED), "latent": Layouts(LATENT, None)}
PLACES = {"in RAM": (700, 0), "on disk": (40, 0), "above": (100, 600), "everywhere": (60, 60)}
"""Blocks of memory of the host, and of an accelerator."""
SPARSITY: dict[str, Callable[[], TableSparsity]] = {
    "top-k": lambda: TopK(0.25),
    "h2o": lambda: H2o(0.4),
    "snapkv": lambda: SnapKv(0.5),
}
MOST_NBYTES = 32 << 10
"""Of a step of two layers, at once: results, and descriptions of what is read next. Parts of the longer history are
more than twice as much."""


def fill(table: BlockTable, tokens: int) -> None:
    """Up to so many tokens."""
    layout = table.layouts.plain
    shape = table.sequences, layout.kv_heads, tokens - table.tokens
    values = None if layout.value_from_key else torch.randn(*shape, layout.value_width)
    table.append(torch.randn(*shape, layout.key_width), values)


@pytest.fixture
def pools(tmp_path: Path) -> Iterator[Callable[..., BlockPool]]:
    made: list[BlockPool] = []

    def make(blocks: int, above: int = 0) -> BlockPool:
        made.append(small_pool(tmp_path, blocks, above))
        return made[-1]

    yield make
    for pool in made:
        pool.check()
        pool.close()


def check_steps(
    pool: BlockPool,
    layouts: Layouts,
    sequences: int,
    new: int,
    *,
    padded: bool = False,
    sparsity: Callable[[], TableSparsity | None] = lambda: None,
) -> None:
    """Two layers in turn, each of which reads the other's first blocks ahead, in a short and in a long history."""
    tables = [BlockTable(pool, layouts, SETTINGS, sequences) for _ in range(2)]
    tables[0].follower, tables[1].follower = weakref.ref(tables[1]), weakref.ref(tables[0])
    plain = layouts.plain
    query = torch.randn(sequences, 4 * plain.kv_heads, new, plain.key_width)
    window = torch.randn(sequences, 4 * plain.kv_heads, 32, plain.key_width)
    key = torch.randn(sequences, plain.kv_heads, 1, plain.key_width)
    mask = np.ones((sequences, 1000 * SIZE), np.bool_)
    # More than a segment of the first sequence.
    mask[0, : 2 * SIZE + 5] = False
    for table in tables:
        table.sparsity = sparsity()

    def step() -> None:
        for table in tables:
            table.append(key, None if plain.value_from_key else key)
            attend_few(table, query, 0.3, valid=mask[:, : table.length] if padded else None)

    steps = []
    for blocks in (30, 120):
        for table in tables:
            # A few steps end within the last block.
            fill(table, blocks * SIZE + 2)
            if table.sparsity is not None and table.sparsity.watches_prompts:
                table.sparsity.watch(table, window, 0.3, mask[:, : table.length] if padded else None)
        # What steps keep is made, and has grown.
        step()
        step()
        steps.append(measured(step))
    short, long = steps
    assert long.tensors == short.tensors <= MOST_NBYTES
    assert long.peak <= MOST_NBYTES
    # Threads that work at the same time reach their peaks together in some steps alone.
    assert pool.counters.blocks_read or long.least - short.most < 4096


@pytest.mark.parametrize(("sequences", "new"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", PLACES)
def test_nothing_that_grows_with_the_history(
    pools: Callable[..., BlockPool], place: str, form: str, new: int, sequences: int
) -> None:
    pool = pools(*PLACES[place])
    check_steps(pool, FORMS[form], sequences, new)
    assert (pool.counters.blocks_read > 0) == (place in ("on disk", "everywhere"))
    assert (pool.counters.accelerated_steps > 0) == (place in ("above", "everywhere"))


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("place", PLACES)
def test_masks_are_read_in_place(pools: Callable[..., BlockPool], place: str, new: int) -> None:
    check_steps(pools(*PLACES[place]), FORMS["int8"], 2, new, padded=True)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", SPARSITY)
@pytest.mark.parametrize("place", ["in RAM", "on disk"])
def test_attention_to_a_part(pools: Callable[..., BlockPool], place: str, method: str, padded: bool) -> None:
    pool = pools(*PLACES[place])
    check_steps(pool, FORMS["int8"], 2, 1, padded=padded, sparsity=SPARSITY[method])
    assert pool.counters.sparsity.sparse_steps > 0 and not pool.counters.sparsity.refused
