"""Groups of experts in ascending order: all of them once, only what is there, no more than fits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest

from offload.moe.in_order import borrowed_in_order
from tests.moe.rig import Rig

SIZES = [3, 1, 4, 1, 5, 9, 2, 6]
KEYS = list(range(len(SIZES)))


def make_resident(rig: Rig, keys: Iterable[int]) -> None:
    for group in borrowed_in_order(rig.tier, sorted(keys)):
        assert len(group) == 1


@pytest.mark.parametrize("slots", [1, 2, 5, 8])
@pytest.mark.parametrize("most", [0, 4, 7, 100])
@pytest.mark.parametrize("seed", range(4))
def test_all_once_in_groups_of_what_is_there(make_rig: Callable[..., Rig], slots: int, most: int, seed: int) -> None:
    draw = random.Random(seed)
    rig = make_rig(slots=slots, count=len(SIZES), layers=1)
    make_resident(rig, draw.sample(KEYS, draw.randint(0, slots)))
    seen: list[int] = []
    for group in borrowed_in_order(rig.tier, KEYS, None, SIZES, most):
        assert all(rig.tier.holds(key) for key in group)
        assert len(group) == 1 or sum(SIZES[key] for key in group) <= most
        seen += group
    assert seen == KEYS
    rig.assert_idle()


def test_what_is_all_there_comes_at_once(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(slots=len(SIZES), count=len(SIZES), layers=1)
    make_resident(rig, KEYS)
    assert list(borrowed_in_order(rig.tier, KEYS, None, SIZES, sum(SIZES))) == [KEYS]
    assert list(borrowed_in_order(rig.tier, KEYS)) == [[key] for key in KEYS]


def test_a_group_is_small_while_others_load(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(slots=len(SIZES), count=len(SIZES) + 1, layers=1)
    make_resident(rig, KEYS)
    groups = list(borrowed_in_order(rig.tier, [*KEYS, len(SIZES)], None, [*SIZES, 1], 100))
    assert len(groups[0]) == 4
    assert [key for group in groups for key in group] == [*KEYS, len(SIZES)]
    rig.assert_idle()


def test_it_is_told_once_that_loads_have_begun(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(slots=3, count=len(SIZES), layers=1)
    make_resident(rig, [2])
    loading: list[int] = []
    groups = borrowed_in_order(rig.tier, KEYS, begun=lambda: loading.append(rig.tier.loading))
    assert [key for group in groups for key in group] == KEYS
    assert loading == [2]
