"""What the default policy takes is what planners count."""

from __future__ import annotations

import tracemalloc

import pytest

from prefetch.policies.forecast import ForecastPolicy
from prefetch.policies.geometry import Geometry
from prefetch.policies.links import sources_of, tables_nbytes


def test_sources_are_the_layer_itself_the_one_before_and_the_first_while_they_are_few() -> None:
    assert [sources_of([64] * 4, layer) for layer in range(4)] == [[0], [1, 0], [2, 1, 0], [3, 2, 0]]
    assert [sources_of([100, 100, 100], layer) for layer in range(3)] == [[0], [1, 0], [2, 1]]
    assert sources_of([300, 300], 1) == [1]


@pytest.mark.parametrize("counts", [(16,) * 6, (128,) * 48, (256,) * 20, (5, 300, 7)])
def test_tables_take_no_more_than_is_counted(counts: tuple[int, ...]) -> None:
    ForecastPolicy(Geometry((2,)))
    tracemalloc.start()
    try:
        policy = ForecastPolicy(Geometry(counts))
        policy.on_resize(sum(counts))
        for key in range(sum(counts)):
            policy.on_insert(key)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert sum(links.nbytes for links in policy.links) < taken <= tables_nbytes(counts)
