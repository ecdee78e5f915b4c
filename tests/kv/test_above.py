"""Blocks in an accelerator's memory: who attends to them, and how they come down while the link is slow or fails."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpu_kernels.prepared_attention import BlockLists, PreparedAttention
from offload.devices import host_accelerator, host_attention
from offload.devices.base import AttentionBatch, AttentionPart
from offload.devices.host_accelerator import HostAccelerator
from offload.devices.link import Link, LinkReader
from offload.kv import few_tokens
from offload.kv.attention import attend_in_place
from tests.kv.gate import Gate
from tests.kv.tables import HEADS, PLAIN, SETTINGS, WIDTH, Twin, make_table, small_pool


class GatedReader(LinkReader):
    """Copies wait until the schedule lets as many of them go, or fail."""

    def __init__(self) -> None:
        super().__init__(Link(1e15, 0.0))
        self.gate = Gate()
        self.failing = 0

    def read(self, shard: int, offset: int, out: memoryview) -> None:
        self.gate.pass_one()
        if self.failing:
            self.failing -= 1
            raise OSError(5, "the link is gone")
        super().read(shard, offset, out)


class GatedAccelerator(HostAccelerator):
    def __init__(self, blocks: int) -> None:
        super().__init__(blocks * PLAIN.nbytes, Link(1e15, 0.0))
        self.reader = GatedReader()

    def copy_down_reader(self) -> LinkReader:
        return self.reader


@pytest.mark.parametrize("seed", range(12))
def test_blocks_that_are_moving_may_be_freed_shared_or_reopened(tmp_path: Path, seed: int) -> None:
    chance, device = random.Random(seed), GatedAccelerator(20)
    pool = small_pool(tmp_path, 20, 20, device)
    twin = Twin(make_table(pool, 1), seed)
    # As much as fits, so that copies ahead are queued and none is done.
    twin.append(16 * 18)
    assert pool.above is not None and pool.above.blocks_moved > 0
    for _ in range(12):
        match chance.choice(["crop", "copy", "grow", "let go"]):
            case "crop":
                twin.crop(chance.randint(1, twin.table.tokens))
            case "copy":
                other = twin.copy()
                assert other.table.tokens == twin.table.tokens
                del other
            case "grow" if twin.table.tokens < 16 * 17:
                twin.append(chance.randint(1, 15))
            case _:
                device.reader.gate.let_go(chance.randint(1, 3))
        pool.check()
    device.reader.gate.open()
    twin.append(300)
    twin.check()
    pool.check()
    pool.close()


def test_a_copy_that_fails_ends_in_its_error_and_nothing_is_lost(tmp_path: Path) -> None:
    device = GatedAccelerator(8)
    device.reader.gate.open()
    pool = small_pool(tmp_path, 40, 8, device)
    twin = Twin(make_table(pool, 1))
    twin.append(16 * 7)
    device.reader.failing = 1
    keys = torch.zeros(1, HEADS, 16 * 20, WIDTH)
    with pytest.raises(OSError, match="the link is gone"):
        twin.table.append(keys, torch.zeros(1, HEADS, 16 * 20, PLAIN.value_width))
    pool.check()
    twin.table.crop(16 * 7)
    twin.check()
    twin.append(16 * 20)
    twin.check()
    pool.check()
    pool.close()


@pytest.mark.parametrize("above", [6, 13, 40])
def test_each_device_attends_to_what_is_in_its_memory(
    tmp_path: Path, above: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[int]] = {"host": [], "accelerator": []}

    def spy(module: Any, name: str) -> None:
        def prepare(lists: BlockLists, *told: Any) -> PreparedAttention:
            seen[name].extend(lists.addresses.tolist())
            return PreparedAttention(lists, *told)

        monkeypatch.setattr(module, "PreparedAttention", prepare)

    def attend(batch: AttentionBatch, **told: Any) -> AttentionPart:
        seen["host"].extend(batch.addresses.tolist())
        return host_attention.attend(batch, **told)

    spy(few_tokens, "host")
    spy(host_accelerator, "accelerator")
    monkeypatch.setattr(few_tokens, "attend", attend)
    pool = small_pool(tmp_path, 40, above)
    twin = Twin(make_table(pool, 2))
    for tokens in (100, 90, 1):
        twin.append(tokens)
    attend_in_place(twin.table, torch.randn(2, HEADS, 1, WIDTH), 0.3)
    blocks = twin.table.all_blocks(twin.table.columns).reshape(-1)
    own = pool.addresses[blocks]
    here = set(own[pool.is_above[blocks]].tolist())
    assert seen["accelerator"] and set(seen["accelerator"]) <= here
    assert not here & set(seen["host"]), "the host reads an accelerator's memory"
    assert len(seen["host"]) + len(seen["accelerator"]) == len(blocks)
    # Of the newest blocks, all but those of a segment that is in part below.
    assert len(here) - len(seen["accelerator"]) < 2 * SETTINGS.segment_blocks
    pool.close()


def test_the_newest_blocks_are_above(tmp_path: Path) -> None:
    pool = small_pool(tmp_path, 8, 20)
    twins = [Twin(make_table(pool, 1), seed) for seed in range(2)]
    for _ in range(20):
        for twin in twins:
            twin.append(16)
    for twin in twins:
        blocks = twin.table.blocks(0, 0, twin.table.columns)
        high = pool.is_above[blocks]
        assert 0 < high.sum() < len(blocks)
        # From the oldest to the newest: disk, host memory, the accelerator's.
        tiers = np.where(high, 2, np.where(pool.addresses[blocks] == 0, 0, 1))
        assert (np.diff(tiers) >= 0).all(), tiers
    in_vram, in_ram, on_disk = pool.tiers_nbytes()
    assert in_vram + in_ram + on_disk >= 40 * PLAIN.nbytes and min(in_vram, in_ram, on_disk) > 0
    pool.close()


def test_memory_that_open_blocks_take_leaves_the_others_below(tmp_path: Path) -> None:
    pool = small_pool(tmp_path, 30, 2)
    twins = [Twin(make_table(pool, 2), seed) for seed in range(3)]
    for _ in range(5):
        for twin in twins:
            twin.append(9)
    for twin in twins:
        twin.check()
    pool.check()
    pool.close()
