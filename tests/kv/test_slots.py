"""Memory for blocks of two sizes out of one budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from formats.kv import KvLayout
from offload.devices.host import HostDevice, HostSlab
from offload.kv.slots import PAGE_NBYTES, RamSlots
from offload.kv.table import BlockTable, Layouts
from tests.kv.tables import HEADS, SETTINGS, small_pool


def test_some_free_slots_of_other_sizes_are_spared() -> None:
    small, large = PAGE_NBYTES, 2 * PAGE_NBYTES
    slots = RamSlots(HostDevice(), 64 * PAGE_NBYTES)
    taken = [slots.take(small) for _ in range(64)]
    assert None not in taken and slots.take(large) is None
    for address in taken[:7]:
        assert address is not None
        slots.give(address, small)
    # A sixteenth of the budget stays.
    assert slots.take(large, spare=True) is not None
    assert slots.take(large, spare=True) is None
    assert slots.take(large) is not None
    assert slots.take(large) is not None
    assert slots.take(large) is None
    assert slots.used_nbytes == 63 * PAGE_NBYTES


def test_memory_stays_where_it_is_while_blocks_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are written to and packed ones take turns: neither gives memory back for the other."""
    settings, pool = replace(SETTINGS, piece_blocks=4), small_pool(tmp_path, 600)
    plain, packed = (KvLayout(format, HEADS, 64, 64, settings.block_tokens) for format in ("fp32", "int8"))
    assert plain.nbytes > packed.nbytes
    table = BlockTable(pool, Layouts(plain, packed), settings, 1)

    def append(tokens: int) -> None:
        table.append(*torch.zeros(2, 1, HEADS, tokens, 64))

    while not pool.tiers_nbytes()[2]:
        append(64)
    append(320)
    discarded: list[int] = []
    discard = HostSlab.discard

    def noting(slab: HostSlab, offset: int, nbytes: int) -> None:
        discarded.append(nbytes)
        discard(slab, offset, nbytes)

    monkeypatch.setattr(HostSlab, "discard", noting)
    before = pool.below.blocks_written
    for tokens in (64, 1, 320, 16, 100):
        append(tokens)
    assert pool.below.blocks_written > before
    assert not discarded
    pool.check()
    pool.close()
