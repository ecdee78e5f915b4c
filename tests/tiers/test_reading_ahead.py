"""Reads ahead under every order of cancels, evictions and faults: no expert lost, doubled or torn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from offload.errors import StorageError, StoreCorruptError
from offload.moe.step import as_they_come
from offload.tiers.transfer import Urgency
from prefetch.policies.geometry import Geometry
from prefetch.policies.named import make_policy
from tests.tiers.readers import Gate
from tests.tiers.test_expert_tier import EXPERTS, Rig

KEYS = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True)
FIRST = 4
GEOMETRY = Geometry((FIRST, EXPERTS - FIRST))
LAYERS = (range(FIRST), range(FIRST, EXPERTS))
# A step asks for experts of one layer.
OF_A_LAYER = st.sampled_from(LAYERS).flatmap(lambda layer: st.lists(st.sampled_from(layer), min_size=1, unique=True))


class Ahead:
    """A step's watch that reads ahead what is not here."""

    prefill = False

    def __init__(self, rig: Rig, then: list[int]) -> None:
        self.rig, self.then = rig, then

    def loads_started(self) -> None:
        tier = self.rig.tier
        tier.start_loads([key for key in self.then if tier.table.slot_of(key) is None], Urgency.SOON)

    def waiting(self) -> None:
        """Nothing is learnt."""


class AheadMachine(RuleBasedStateMachine):
    """What a runtime with a prefetcher does to a tier, in any order; readers run freely beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.rig: Rig | None = None

    @rule(slots=st.integers(1, 6), threads=st.integers(1, 3), policy=st.sampled_from(["forecast", "lru", "arc"]))
    def start(self, slots: int, threads: int, policy: str) -> None:
        if self.rig is None:
            self.rig = Rig(slots, threads, make_policy(policy, GEOMETRY))

    def ready(self) -> Rig:
        if self.rig is None:
            self.rig = Rig(3, 2, make_policy("forecast", GEOMETRY))
        return self.rig

    @rule(keys=OF_A_LAYER, then=KEYS)
    def step_with_reads_ahead(self, keys: list[int], then: list[int]) -> None:
        """As the MoE step: what is needed first, then reads ahead, then work."""
        rig = self.ready()
        try:
            borrowed, missing = rig.tier.borrow(keys)
            as_they_come(rig.tier, borrowed, missing, rig.check_content, Ahead(rig, then))
        except (StorageError, StoreCorruptError):
            assert (rig.broken | rig.flipped) & set(keys)
            rig.tier.abandon()

    @rule(keys=KEYS)
    def read_ahead(self, keys: list[int]) -> None:
        self.ready().tier.start_loads(keys, Urgency.SOON)

    @rule(keys=KEYS)
    def change_of_mind(self, keys: list[int]) -> None:
        self.ready().tier.cancel_ahead(keys)

    @rule(slots=st.integers(1, 6))
    def resize(self, slots: int) -> None:
        rig = self.ready()
        rig.tier.resize(slots)
        assert rig.tier.table.usable_slots == max(1, min(slots, rig.arena.count))

    @rule()
    def interrupt(self) -> None:
        self.ready().tier.abandon()

    @rule(broken=st.sets(st.integers(0, EXPERTS - 1), max_size=2), flipped=st.integers(-1, EXPERTS - 1))
    def weather(self, broken: set[int], flipped: int) -> None:
        rig = self.ready()
        # What is on its way arrives in the weather that it left in.
        rig.engine.wait_all(list(rig.tier._tickets.values()))
        rig.broken, rig.flipped = broken, {flipped} - {-1}

    @invariant()
    def whole(self) -> None:
        if self.rig is not None:
            self.rig.tier.check()
            counters, waiting = self.rig.tier.counters, len(self.rig.tier._ahead)
            settled = counters.ahead_used + counters.ahead_late + counters.ahead_wasted
            assert counters.ahead_issued == settled + waiting, "a read ahead was lost or counted twice"

    def teardown(self) -> None:
        if self.rig is not None:
            self.rig.broken, self.rig.flipped = set(), set()
            self.rig.tier.abandon()
            for layer in LAYERS:
                self.rig.step(layer)
            self.rig.engine.close()


TestReadingAhead = AheadMachine.TestCase
TestReadingAhead.settings = settings(
    max_examples=1000, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(**options: Any) -> Rig:
        rigs.append(Rig(**options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.engine.close()


def test_a_read_ahead_is_used_late_or_wasted(make: Callable[..., Rig]) -> None:
    rig = make(slots=4, threads=1)
    gate = Gate()
    rig.reader.before_read = gate
    rig.tier.start_loads([0, 3, 6], Urgency.SOON)
    (call,) = gate.wait_for(1)
    gate.let_go(call)
    gate.wait_for(1)
    rig.engine.wait_all([rig.tier._tickets[0]])
    assert rig.tier.borrow([0, 3]) == ([0], [3])
    assert sorted(rig.tier.reading_ahead) == [6]
    rig.tier.cancel_ahead([0, 3, 6])
    gate.open()
    rig.tier.start_loads([3])
    assert rig.tier.collect([3]) == [3]
    counters = rig.tier.counters
    assert (counters.ahead_issued, counters.ahead_used, counters.ahead_late) == (3, 1, 1)
    assert counters.ahead_wasted == 1
    assert counters.late_stall_s <= counters.stall_s
    rig.tier.give_back([0, 3])
    rig.tier.check()


class Told:
    """A step's watch that keeps what it was told."""

    prefill = False

    def __init__(self) -> None:
        self.told: list[str] = []

    def loads_started(self) -> None:
        self.told.append("loads started")

    def waiting(self) -> None:
        self.told.append("waiting")


def test_a_step_says_when_it_can_only_wait(make: Callable[..., Rig]) -> None:
    rig, told = make(slots=3, threads=1), Told()
    for keys in ([0, 1], [0, 2, 4, 6, 8], [6]):
        borrowed, missing = rig.tier.borrow(keys)

        def compute(keys: list[int]) -> None:
            told.told.append("compute")
            rig.check_content(keys)

        as_they_come(rig.tier, borrowed, missing, compute, told)
    steps = " ".join(told.told).split("loads started")[1:]
    # Nothing is here; one is; nothing is missing.
    assert [step.split("compute").count(" waiting ") for step in steps] == [1, 1, 0]
    assert [step.split()[0] for step in steps] == ["waiting", "compute", "compute"]
    assert steps[1].split()[1] == "waiting"


def test_victims_that_are_named_leave(make: Callable[..., Rig]) -> None:
    rig = make(slots=3, threads=1)
    rig.step([0, 1, 2])
    # The policy would name 0.
    assert rig.tier.start_loads([6, 7], Urgency.SOON, [2, 1]) == 2
    assert set(rig.tier.table) == {0, 6, 7}
    assert rig.tier.start_loads([8], Urgency.SOON, []) == 0
    rig.engine.wait_all(list(rig.tier._tickets.values()))
    rig.tier.settle_arrived()
    assert rig.tier.loading == 0
    rig.tier.check()


def test_a_cancelled_read_that_is_needed_after_all_is_read_again(make: Callable[..., Rig]) -> None:
    rig = make(slots=2, threads=1)
    gate = Gate()
    rig.reader.before_read = gate
    # Key 5 has three chunks: one is being read when it is cancelled.
    rig.tier.start_loads([5], Urgency.SOON)
    gate.wait_for(1)
    rig.tier.cancel_ahead([5])
    gate.open()
    rig.step([5])
    rig.tier.check()


def test_a_smaller_tier_ends_reads_ahead(make: Callable[..., Rig]) -> None:
    rig = make(slots=4, threads=1)
    gate = Gate()
    rig.reader.before_read = gate
    rig.tier.start_loads([0, 3, 6, 9], Urgency.SOON)
    (call,) = gate.wait_for(1)
    opener = rig.engine.wait_all

    def open_and_wait(tickets: Any) -> None:
        gate.let_go(call)
        gate.open()
        opener(tickets)

    rig.engine.wait_all = open_and_wait  # type: ignore[method-assign]
    rig.tier.resize(1)
    assert rig.tier.table.usable_slots == 1
    rig.tier.check()
