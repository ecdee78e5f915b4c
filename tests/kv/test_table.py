"""Tables against plain tensors, with less memory than tokens."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest
import torch

from offload.errors import DoesNotFitError
from tests.kv.tables import PLAIN, SETTINGS, Twin, make_table, small_pool


@pytest.mark.parametrize("above", [0, 3, 14])
@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_changes_leaves_the_tokens_that_tensors_have(tmp_path: Path, seed: int, above: int) -> None:
    pool, chance = small_pool(tmp_path, 26 if above < 14 else 16, above), random.Random(seed)
    twins = [Twin(make_table(pool, chance.choice([1, 2])), seed)]
    twins[0].append(250)
    for _ in range(40):
        twin = chance.choice(twins)
        match chance.choice(["append", "append", "append", "crop", "select", "copy", "drop"]):
            case "append":
                twin.append(chance.choice([1, 5, 16, 90]))
            case "crop":
                twin.crop(chance.randint(0, twin.table.tokens))
            case "select":
                twin.select([chance.randrange(twin.table.sequences) for _ in range(chance.choice([1, 2]))])
            case "copy" if len(twins) < 3:
                twins.append(twin.copy())
            case "drop" if len(twins) > 1:
                twins.remove(twin)
        del twin
        pool.check()
    for twin in twins:
        twin.check()
    assert pool.below.blocks_written > 0, "nothing left memory: the test shows nothing"
    assert pool.above is None or pool.above.blocks_moved > 0
    pool.check()
    pool.close()


def test_blocks_of_tables_that_are_gone_are_free(tmp_path: Path) -> None:
    pool = small_pool(tmp_path, 20)
    for _ in range(5):
        twin = Twin(make_table(pool, 2))
        twin.append(100)
        twin.check()
        del twin
        gc.collect()
    pool.release_abandoned()
    assert pool.tiers_nbytes()[2] == 0
    # Blocks that are being written keep their slot until it is needed.
    assert pool.slots.used_nbytes <= pool.slots.budget_nbytes
    pool.check()
    pool.close()


def test_the_file_does_not_grow_with_caches_that_come_and_go(tmp_path: Path) -> None:
    pool = small_pool(tmp_path, 6)
    sizes = []
    for _ in range(6):
        twin = Twin(make_table(pool, 1))
        twin.append(300)
        sizes.append(pool.file.nbytes)
        del twin
        gc.collect()
    assert sizes[-1] <= 2 * sizes[0]
    pool.close()


def test_sequences_share_blocks_until_one_writes(tmp_path: Path) -> None:
    pool = small_pool(tmp_path, 30)
    twin = Twin(make_table(pool, 1))
    twin.append(3 * 16 + 5)
    before = pool.slots.used_nbytes
    twin.select([0, 0, 0])
    assert pool.slots.used_nbytes == before
    twin.append(1)
    # Full blocks are still shared; each sequence has a last block of its own.
    assert pool.slots.used_nbytes == before + 2 * PLAIN.nbytes
    twin.check()
    pool.close()


def test_a_table_that_cannot_grow_says_so_and_keeps_what_it_had(tmp_path: Path) -> None:
    pool = small_pool(tmp_path, 2)
    twin = Twin(make_table(pool, 2))
    twin.append(8)
    other = make_table(pool, 1)
    with pytest.raises(DoesNotFitError, match="kv_ram"):
        other.append(torch.zeros(1, 2, 1, 12), torch.zeros(1, 2, 1, 8))
    pool.check()
    twin.check()
    pool.close()


@pytest.mark.parametrize("packed", ["int8", "fp8_e4m3"])
def test_old_blocks_are_packed_and_recent_ones_are_as_they_came(tmp_path: Path, packed: str) -> None:
    pool = small_pool(tmp_path, 20)
    twin = Twin(make_table(pool, 2, packed), 3)
    for tokens in (50, 1, 1, 70, 9):
        twin.append(tokens)
    old = twin.table.sealed * SETTINGS.block_tokens
    assert twin.table.tokens - old in range(SETTINGS.recent_tokens, SETTINGS.recent_tokens + SETTINGS.block_tokens)
    for row in range(2):
        keys, values = twin.table.read(row, 0, twin.table.tokens)
        assert torch.equal(keys[:, old:], twin.keys[row, :, old:])
        for found, expected in ((keys, twin.keys[row]), (values, twin.values[row])):
            error = (found - expected)[:, :old].abs().amax()
            assert 0 < error < 0.2
    pool.check()
    pool.close()


def test_a_crop_into_packed_blocks_goes_on_from_what_they_hold(tmp_path: Path) -> None:
    pool = small_pool(tmp_path, 20)
    twin = Twin(make_table(pool, 2, "int8"), 3)
    twin.append(120)
    before = [twin.table.read(row, 0, 37) for row in range(2)]
    twin.table.crop(37)
    twin.select([1, 0])
    twin.table.append(torch.ones(2, 2, 30, 12), torch.ones(2, 2, 30, 8))
    for row in range(2):
        keys, values = twin.table.read(row, 0, 67)
        assert torch.allclose(keys[:, :37], before[1 - row][0], atol=0.05)
        assert torch.allclose(values[:, :37], before[1 - row][1], atol=0.05)
        assert torch.allclose(keys[:, 37:], torch.ones(2, 30, 12), atol=0.05)
    pool.check()
    pool.close()
