"""Space for blocks against a plain set of what is taken."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from offload.kv.spill_file import EXTENT_BLOCKS, SpillFile

SIZES = 4096, 8192


@pytest.mark.parametrize("seed", range(6))
def test_space_is_one_blocks_at_a_time_and_is_used_again(tmp_path: Path, seed: int) -> None:
    chance, file = random.Random(seed), SpillFile(tmp_path)
    taken: dict[int, int] = {}
    for _ in range(1500):
        # Swells and ebbs, so that extents fill, empty and change hands.
        if chance.random() < (0.7 if len(taken) < chance.choice([10, 200]) else 0.3):
            nbytes = chance.choice(SIZES)
            offset = file.take(chance.randrange(3), nbytes)
            assert offset + nbytes <= file.nbytes
            taken[offset] = nbytes
        elif taken:
            offset = chance.choice(list(taken))
            file.give(offset)
            del taken[offset]
        spans = sorted(taken.items())
        assert all(one + nbytes <= other for (one, nbytes), (other, _) in pairwise(spans))
    for offset in taken:
        file.give(offset)
    before = file.nbytes
    for _ in range(before // (2 * SIZES[1])):
        file.take(7, SIZES[chance.randrange(2)])
    assert file.nbytes <= before + EXTENT_BLOCKS * sum(SIZES)
    file.close()


def test_an_owner_keeps_what_is_full_when_another_extent_of_its_empties(tmp_path: Path) -> None:
    file = SpillFile(tmp_path)
    offsets = [file.take(1, SIZES[0]) for _ in range(2 * EXTENT_BLOCKS)]
    for offset in (*offsets[EXTENT_BLOCKS:], *offsets[:EXTENT_BLOCKS]):
        file.give(offset)
    assert {file.take(1, SIZES[0]) for _ in offsets} == set(offsets)
    file.close()
