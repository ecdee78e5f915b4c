"""Distances against counting them, one request at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.stack_distances import FIRST, stack_distances


@given(st.lists(st.integers(0, 6), max_size=60))
def test_distances_are_counted(keys: list[int]) -> None:
    counted = []
    for index, key in enumerate(keys):
        before = [i for i in range(index) if keys[i] == key]
        counted.append(len(set(keys[before[-1] + 1 : index])) if before else FIRST)
    assert stack_distances(keys).tolist() == counted


@settings(deadline=None)
@given(st.lists(st.sets(st.integers(0, 9), min_size=1), max_size=20))
def test_requests_of_a_step_are_looked_up_together(steps: list[set[int]]) -> None:
    keys = [key for step in steps for key in sorted(step)]
    starts = np.cumsum([0, *map(len, steps)])[:-1]
    counted = []
    for number, step in enumerate(steps):
        for key in sorted(step):
            first = [i for i in range(starts[number]) if keys[i] == key]
            counted.append(len(set(keys[first[-1] + 1 : starts[number]])) if first else FIRST)
    assert stack_distances(keys, starts).tolist() == counted


def test_a_long_sequence_in_turn_has_one_distance() -> None:
    found = stack_distances(np.tile(np.arange(1000), 30))
    assert (found[:1000] == FIRST).all()
    assert (found[1000:] == 999).all()
