"""Tables whose blocks are in memories that only their own devices write: nothing is lost between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from formats.kv import KvLayout
from offload.kv.attention import attend_by_segments, attend_in_place
from offload.kv.slots import view
from offload.kv.table import BlockTable, Layouts
from tests.kv.tables import HEADS, PLAIN, SETTINGS, VALUE_WIDTH, WIDTH, Twin, pool_below_cuda, random_states

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the fake's memory is the host's, which compiled kernels do not read"
)


def _expected(twin: Twin, query: torch.Tensor) -> torch.Tensor:
    keys, values = (side.double().repeat_interleave(2, 1) for side in (twin.keys, twin.values))
    new, tokens = query.shape[2], keys.shape[2]
    seen = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)
    scores = (0.4 * query.double() @ keys.mT).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ values


@pytest.mark.parametrize("above", [3, 9, 40])
def test_what_tables_do(tmp_path: Path, above: int) -> None:
    """Growing over all tiers, sharing, forgetting, taking back, attention to few and to many."""
    pool = pool_below_cuda(tmp_path, 10, above)
    twin = Twin(BlockTable(pool, Layouts(PLAIN, None), SETTINGS, 2))
    for tokens in (100, 41, 1, 17, 1):
        twin.append(tokens)
    twin.check()
    other = twin.copy()
    other.append(5)
    twin.append(3)
    twin.select([1, 1])
    twin.append(2)
    for one in (twin, other):
        one.check()
    query = torch.randn(2, 2 * HEADS, 2, WIDTH, generator=torch.Generator().manual_seed(1))
    out = attend_in_place(twin.table, query, 0.4)
    assert (out - _expected(twin, query)).abs().max() < 2e-6
    twin.crop(95)
    twin.append(4)
    twin.check()
    keys, values = random_states(twin.generator, 2, 20)
    twin.table.append(keys, values)
    twin.keys, twin.values = torch.cat([twin.keys, keys], 2), torch.cat([twin.values, values], 2)
    query = torch.randn(2, 2 * HEADS, 20, WIDTH, generator=twin.generator)
    out = attend_by_segments(twin.table, query, keys, values, 0.4)
    assert (out - _expected(twin, query)).abs().max() < 2e-6
    pool.check()
    assert pool.counters.accelerated_steps or above == 3
    pool.close()


@pytest.mark.parametrize("format", ["fp8_e4m3", "int8", "int4"])
def test_packing_where_blocks_are(tmp_path: Path, format: str) -> None:
    """Blocks packed above, below, and from one to the other have the same bytes."""
    size = 64 if format == "int4" else 16
    settings = replace(SETTINGS, block_tokens=size, recent_tokens=size)
    plain = replace(PLAIN, block_tokens=size)
    layouts = Layouts(plain, KvLayout(format, HEADS, WIDTH, VALUE_WIDTH, size))
    found = []
    for above in (2, 5, 40):
        pool = pool_below_cuda(tmp_path, 30, above, plain.nbytes)
        table = BlockTable(pool, layouts, settings, 2)
        keys, values = random_states(torch.Generator().manual_seed(3), 2, 6 * size + 3)
        for first in range(0, 6 * size + 3, size - 5):
            table.append(keys[:, :, first : first + size - 5], values[:, :, first : first + size - 5])
        found.append([side for row in range(2) for side in table.read(row, 0, table.tokens)])
        table.crop(4 * size - 3)
        pool.check()
        assert all(torch.equal(*pair) for pair in zip(
            table.read(1, 0, size), [side[:, :size] for side in found[-1][2:]], strict=True
        ))  # fmt: skip
        pool.close()
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


def test_restored_blocks_go_where_there_is_room(tmp_path: Path) -> None:
    pool = pool_below_cuda(tmp_path, 20, 3)
    twin = Twin(BlockTable(pool, Layouts(PLAIN, None), SETTINGS, 1))
    twin.append(90)
    contents = []
    for column in range(twin.table.columns):
        with pool.use(), pool.at_hand(twin.table.blocks(0, column, column + 1)) as addresses:
            contents.append(np.frombuffer(view(int(addresses[0]), PLAIN.nbytes), np.uint8).copy())
    other = BlockTable(pool, Layouts(PLAIN, None), SETTINGS, 1)
    other.restore(iter(contents), 90, twin.table.sealed)
    keys, values = other.read(0, 0, 90)
    assert torch.equal(keys, twin.keys[0])
    assert torch.equal(values, twin.values[0])
    pool.check()
    pool.close()
