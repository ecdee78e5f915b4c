"""Which experts are copied to an accelerator ahead, and which are not worth it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from offload.copy_ahead import CopyAhead
from prefetch.policies.forecast import ForecastPolicy
from prefetch.policies.geometry import Geometry
from prefetch.scheduler.records import LayerCosts
from tests.moe.tiered_rig import FixedCosts, TieredRig
from tests.tiers.scheduled_engine import ScheduledEngine

COUNT = 8
GEOMETRY = Geometry.uniform(2, COUNT)
# One expert takes the CPU 10 s, the accelerator 1 s, the link 3 s.
COSTS = LayerCosts(cpu_token_s=0.0, cpu_expert_s=10.0, gpu_expert_s=1.0, link_expert_s=3.0)


@pytest.fixture
def make() -> Iterator[Callable[..., tuple[TieredRig, CopyAhead]]]:
    rigs = []

    def make(*, above: int = 8, **options: Any) -> tuple[TieredRig, CopyAhead]:
        engine = partial(ScheduledEngine, chance=random.Random(1))
        rig = TieredRig(above=above, slots=16, costs=COSTS, count=COUNT, layers=2, engine=engine, **options)
        rigs.append(rig)
        # All of the second layer is in RAM.
        rig.tier.fetch(range(COUNT, 2 * COUNT), lambda _key: None)
        return rig, CopyAhead(rig.accelerated, rig.layers, GEOMETRY)

    yield make
    for rig in rigs:
        rig.pair.end_copies()
        rig.assert_idle()
        rig.close()


def foreseen(**probabilities: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    found = np.zeros(COUNT)
    for name, probability in probabilities.items():
        found[int(name[1:])] = probability
    return found


def copied(rig: TieredRig) -> list[int]:
    return sorted(key - COUNT for key in rig.pair.above.table)


def test_the_most_probable_go_first_and_as_many_as_arrive_in_time(make: Callable[..., Any]) -> None:
    rig, ahead = make()
    ahead.copy(1, foreseen(e1=0.5, e2=0.9, e5=0.7, e6=0.2), layer_s=4.0)
    assert copied(rig) == [2], "a second copy would end after 6 s"
    assert rig.pair.held == 1
    rig, ahead = make()
    ahead.copy(1, foreseen(e1=0.5, e2=0.9, e5=0.7, e6=0.2), layer_s=100.0)
    assert copied(rig) == [2, 5], "a quarter of 8 slots"


def test_what_saves_no_time_or_cannot_arrive_is_left(make: Callable[..., Any]) -> None:
    rig, ahead = make()
    ahead.copy(1, foreseen(e1=0.9), layer_s=2.9)
    ahead.copy(1, foreseen(e1=0.29), layer_s=100.0)
    assert copied(rig) == []
    assert isinstance(rig.accelerated.costs, FixedCosts)
    rig.accelerated.costs.costs = LayerCosts(cpu_token_s=0.0, cpu_expert_s=1.0, gpu_expert_s=2.0, link_expert_s=3.0)
    ahead.copy(1, foreseen(e1=0.9, e2=0.9), layer_s=100.0)
    # Both on the CPU take 2 s; with one above, 2 s as well.
    assert copied(rig) == []


def test_what_is_on_disk_or_above_is_not_copied(make: Callable[..., Any]) -> None:
    rig, ahead = make()
    rig.tier.abandon()
    rig.tier._evict(COUNT + 3)
    ahead.copy(1, foreseen(e3=0.9), layer_s=100.0)
    assert copied(rig) == []
    rig.pair.preload([COUNT + 4], lambda _key: None)
    loads = rig.pair.above.counters.loads
    ahead.copy(1, foreseen(e4=0.9), layer_s=100.0)
    assert rig.pair.above.counters.loads == loads
    assert rig.pair.held == 0


@pytest.mark.parametrize("victim_probability", [0.95, 0.4])
def test_a_victim_that_is_worth_more_stays(victim_probability: float, make: Callable[..., Any]) -> None:
    rig, ahead = make(above=4, policy=lambda: ForecastPolicy(GEOMETRY))
    assert isinstance(rig.accelerated.costs, FixedCosts)
    rig.accelerated.costs.costs = LayerCosts(cpu_token_s=0.0, cpu_expert_s=10.0, gpu_expert_s=0.1, link_expert_s=30.0)
    rig.pair.preload(range(COUNT, COUNT + 4), lambda _key: None)
    probabilities = foreseen(
        e0=victim_probability, e1=victim_probability, e2=victim_probability, e3=victim_probability, e7=0.6
    )
    rig.pair.above.policy.on_forecast(COUNT, probabilities)
    ahead.copy(1, probabilities, layer_s=100.0)
    assert (COUNT + 7 in set(rig.pair.above.table)) == (victim_probability < 0.6)


def test_a_layer_that_came_ends_its_copies(make: Callable[..., Any]) -> None:
    rig, ahead = make()
    ahead.copy(1, foreseen(e1=0.5, e2=0.9), layer_s=100.0)
    counters = rig.pair.above.counters
    assert counters.ahead_issued == 2
    ahead.end_layer(0)
    assert counters.ahead_wasted == 0
    on_the_way = len(rig.pair.above.reading_ahead)
    ahead.end_layer(1)
    rig.pair.end_copies()
    assert counters.ahead_wasted == on_the_way
    assert rig.pair.held == 0
