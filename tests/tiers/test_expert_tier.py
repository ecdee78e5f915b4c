"""The expert tier under random scenarios and faults: no expert lost, doubled or torn."""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from offload.devices.host import HostDevice
from offload.errors import ClosedError, StorageError, StoreCorruptError
from offload.tiers.arena import Arena
from offload.tiers.expert_tier import ExpertTier
from offload.tiers.slot_table import SlotState
from offload.tiers.transfer import ReadEngine, ReadRequest, Urgency
from prefetch.policies.base import CachePolicy
from prefetch.policies.lru import LruPolicy
from tests.tiers.children import exit_code_of
from tests.tiers.readers import Gate, MemoryReader, random_bytes

PAGE = 4096
EXPERTS = 10
# Experts of three sizes: 1, 2 and 3 pages; a slot holds the largest.
PAGES = [1 + key % 3 for key in range(EXPERTS)]
OFFSETS = [sum(PAGES[:key]) * PAGE for key in range(EXPERTS)]

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class Rig:
    """A tier over a store in memory.

    Attributes:
        broken: experts whose reads fail with EIO.
        flipped: experts whose bytes arrive wrong.
    """

    def __init__(self, slots: int, threads: int = 2, policy: CachePolicy | None = None) -> None:
        self.reader = MemoryReader(random_bytes(sum(PAGES) * PAGE, seed=5))
        self.broken: set[int] = set()
        self.flipped: set[int] = set()
        self.reader.before_read = self.before_read
        self.reader.after_read = self.after_read
        self.engine = ReadEngine(self.reader.as_shard_reader(), threads=threads, chunk_nbytes=PAGE)
        self.arena = Arena(HostDevice(), 3 * PAGE, slots)
        for slot in range(slots):
            self.arena.view(slot, 3 * PAGE)[:] = 0xA5
        self.tier = ExpertTier(
            self.arena, policy or LruPolicy(), self.engine, self.locate, lambda key: PAGES[key] * PAGE
        )

    @staticmethod
    def key_at(offset: int) -> int:
        return max(key for key in range(EXPERTS) if OFFSETS[key] <= offset)

    def before_read(self, offset: int, _nbytes: int) -> None:
        if self.key_at(offset) in self.broken:
            raise StorageError(errno.EIO, "broken")

    def after_read(self, offset: int, out: memoryview) -> None:
        if self.key_at(offset) in self.flipped:
            out[-1] ^= 1

    def locate(self, key: int, out: memoryview) -> ReadRequest:
        assert len(out) == PAGES[key] * PAGE
        return self.reader.request(OFFSETS[key], np.frombuffer(out, np.uint8))

    def reads_of(self) -> Counter[int]:
        return Counter(self.key_at(offset) for offset, _ in self.reader.calls)

    def check_content(self, keys: Sequence[int]) -> None:
        for key in keys:
            assert self.tier.table.state_of(key) is SlotState.IN_USE
            slot = self.tier.slot(key)
            assert self.tier.address(key) == self.arena.address(slot)
            found = self.arena.view(slot, PAGES[key] * PAGE)
            assert np.array_equal(found, self.reader.shard[OFFSETS[key] :][: found.size]), f"expert {key} is torn"

    def state(self) -> Counter[SlotState]:
        self.tier.check()
        return Counter(self.tier.table.state_of(key) for key in self.tier.table)

    def step(self, keys: Sequence[int]) -> None:
        """What the MoE step does, its arithmetic replaced by a look at the bytes."""
        borrowed, missing = self.tier.borrow(keys)
        assert sorted(borrowed + missing) == sorted(keys)
        while borrowed or missing:
            self.check_content(borrowed)
            self.tier.give_back(borrowed)
            self.tier.start_loads(missing)
            borrowed = self.tier.collect(missing) if missing else []
            assert set(borrowed) <= set(missing)
            missing = [key for key in missing if key not in borrowed]


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    rigs = []

    def make(**options: Any) -> Rig:
        rigs.append(Rig(**options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.engine.close()


MakeRig = Callable[..., Rig]


@pytest.mark.parametrize("slots", range(1, EXPERTS + 1))
def test_every_expert_is_read_once_a_step(make: MakeRig, slots: int) -> None:
    rig = make(slots=slots)
    rig.step(range(EXPERTS))
    chunks = Counter({key: PAGES[key] for key in range(EXPERTS)})
    assert rig.reads_of() == chunks
    counters = rig.tier.counters
    assert (counters.hits, counters.misses, counters.loads) == (0, EXPERTS, EXPERTS)
    assert counters.evictions == EXPERTS - slots
    # The most recent stay.
    resident = sorted(rig.tier.table)
    assert len(resident) == slots
    rig.step(resident)
    assert rig.reads_of() == chunks
    assert rig.tier.counters.hits == slots
    assert rig.state() == Counter({SlotState.READY: slots})


class Scenario:
    """Random calls in an order that a runtime could make, with faults, against what must hold whatever happens."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.slots = self.chance.randint(1, 6)
        self.rig = Rig(self.slots, threads=self.chance.randint(1, 3))
        self.usable = self.slots

    def some_keys(self) -> list[int]:
        return self.chance.sample(range(EXPERTS), self.chance.randint(1, EXPERTS))

    def run(self) -> None:
        try:
            for _ in range(25):
                action = self.chance.choice(
                    [self.step, self.step, self.read_ahead, self.give_up, self.resize, self.fetch, self.weather]
                )
                action()
                states = self.rig.state()
                assert SlotState.IN_USE not in states
                assert self.rig.tier.table.usable_slots <= self.slots
            self.rig.broken.clear()
            self.rig.flipped.clear()
            self.rig.step(range(EXPERTS))
            assert self.rig.state()[SlotState.READY] >= 1
        finally:
            self.rig.engine.close()
        self.rig.tier.release_memory()
        assert not self.rig.state()

    def weather(self) -> None:
        """Which experts cannot be read from now on."""
        bad = self.chance.sample(range(EXPERTS), 2) if self.chance.random() < 0.5 else []
        self.rig.broken = set(bad[:1])
        self.rig.flipped = set(bad[1:])

    def step(self) -> None:
        keys = self.some_keys()
        bad = {*self.rig.broken, *self.rig.flipped}
        # A read that began before the weather turned may come through.
        here = set(self.rig.tier.table)
        try:
            self.rig.step(keys)
        except (StorageError, StoreCorruptError):
            assert bad & set(keys)
            self.rig.tier.abandon()
        else:
            assert not bad & (set(keys) - here)

    def read_ahead(self) -> None:
        keys = self.some_keys()
        started = self.rig.tier.start_loads(keys, Urgency.SOON)
        assert 0 <= started <= len(keys)
        assert all(self.rig.tier.table.slot_of(key) is not None for key in keys[:started])

    def give_up(self) -> None:
        """A step that ends anywhere."""
        keys = self.some_keys()
        rest = self.chance.randint(0, 3)
        borrowed, missing = self.rig.tier.borrow(keys)
        self.rig.check_content(borrowed)
        if rest >= 1:
            started = self.rig.tier.start_loads(missing)
            if rest >= 2 and started:
                try:
                    self.rig.check_content(self.rig.tier.collect(missing[:started]))
                except (StorageError, StoreCorruptError):
                    assert self.rig.broken or self.rig.flipped
        resident = {key for key in borrowed if key in self.rig.tier.table}
        self.rig.tier.abandon()
        states = self.rig.state()
        assert set(states) <= {SlotState.READY}
        assert resident <= set(self.rig.tier.table), "an expert that was here was lost"

    def resize(self) -> None:
        slots = self.chance.randint(-1, self.slots + 2)
        self.rig.tier.abandon()
        self.rig.tier.resize(slots)
        assert self.rig.tier.table.usable_slots == max(1, min(slots, self.slots))

    def fetch(self) -> None:
        usable = self.rig.tier.table.usable_slots
        keys = self.chance.sample(range(EXPERTS), min(usable, self.chance.randint(1, EXPERTS)))
        told: list[int] = []
        self.rig.tier.abandon()
        before = {key for key in keys if key in self.rig.tier.table}
        try:
            self.rig.tier.fetch(keys, told.append)
        except (StorageError, StoreCorruptError):
            assert (self.rig.broken | self.rig.flipped) & set(keys)
        else:
            assert all(self.rig.tier.table.state_of(key) is SlotState.READY for key in keys)
            assert told == [key for key in keys if key not in before]


@pytest.mark.parametrize("block", range(10))
def test_random_scenarios(block: int) -> None:
    for seed in range(60 * block, 60 * (block + 1)):
        Scenario(seed).run()


# --- one thing at a time ------------------------------------------------------------------------------------------


def test_a_failed_read_is_raised_once_and_its_slot_is_free(make: MakeRig) -> None:
    rig = make(slots=3)
    rig.broken = {4}
    rig.tier.borrow([4])
    assert rig.tier.start_loads([4]) == 1
    with pytest.raises(StorageError):
        rig.tier.collect([4])
    rig.tier.abandon()
    assert not rig.state()
    rig.broken = set()
    rig.step([4])
    assert rig.state() == Counter({SlotState.READY: 1})


def test_a_corrupt_expert_is_never_lent(make: MakeRig) -> None:
    rig = make(slots=3)
    rig.flipped = {4}
    for _ in range(2):
        with pytest.raises(StoreCorruptError, match=f"expert at {OFFSETS[4]}"):
            rig.step([4])
        rig.tier.abandon()
        assert 4 not in set(rig.tier.table)


def test_a_read_ahead_that_failed_is_read_again(make: MakeRig) -> None:
    rig = make(slots=3)
    rig.broken = {4}
    rig.tier.start_loads([4], Urgency.SOON)
    rig.engine.wait_all(list(rig.tier._tickets.values()))
    rig.broken = set()
    rig.step([4])
    assert rig.tier.counters.misses == 1


def test_a_read_ahead_that_arrived_is_a_hit(make: MakeRig) -> None:
    rig = make(slots=3)
    rig.tier.start_loads([4, 5], Urgency.SOON)
    rig.engine.wait_all(list(rig.tier._tickets.values()))
    rig.step([5, 4])
    assert (rig.tier.counters.hits, rig.tier.counters.misses) == (2, 0)


def test_reads_ahead_that_hold_every_slot_give_way_when_they_end(make: MakeRig) -> None:
    rig = make(slots=2, threads=1)
    gate = Gate()
    rig.reader.before_read = gate
    rig.tier.start_loads([0, 3], Urgency.SOON)
    assert rig.tier.borrow([6]) == ([], [6])
    assert rig.tier.start_loads([6]) == 0
    (call,) = gate.wait_for(1)
    gate.let_go(call)
    # Nothing of this step is loading: this waits for a read ahead.
    assert rig.tier.collect([]) == []
    gate.open()
    rig.step([6, 0, 3])
    assert rig.state() == Counter({SlotState.READY: 2})


def test_an_urgent_start_promotes_a_read_ahead(make: MakeRig) -> None:
    rig = make(slots=3, threads=1)
    gate = Gate()
    rig.reader.before_read = gate
    rig.tier.start_loads([0, 3, 6], Urgency.SOON)
    gate.wait_for(1)
    rig.tier.start_loads([6])
    gate.open()
    rig.engine.wait_all(list(rig.tier._tickets.values()))
    assert [rig.key_at(offset) for offset, _ in rig.reader.calls] == [0, 6, 3]


def test_borrowed_and_loading_experts_are_not_evicted(make: MakeRig) -> None:
    rig = make(slots=2)
    rig.step([1])
    assert rig.tier.borrow([1, 2, 3]) == ([1], [2, 3])
    assert rig.tier.start_loads([2, 3]) == 1
    assert rig.tier.collect([2]) == [2]
    assert rig.tier.start_loads([3]) == 0
    rig.check_content([1, 2])
    rig.tier.give_back([1])
    assert rig.tier.start_loads([3]) == 1
    rig.check_content([2])
    rig.tier.discard_borrowed(2)
    assert rig.tier.table.slot_of(2) is None
    rig.tier.abandon()
    rig.tier.check()


def test_fetch_keeps_what_is_here_and_waits_for_what_is_on_its_way(make: MakeRig) -> None:
    rig = make(slots=3)
    for key in (0, 7, 8):
        rig.step([key])
    # 0 is the least recent: making room for 1 must not cost it.
    told: list[int] = []
    rig.tier.fetch([0, 1], told.append)
    assert told == [1]
    rig.step([0, 1])
    assert rig.reads_of()[0] == PAGES[0]
    rig.tier.start_loads([5], Urgency.SOON)
    rig.tier.fetch([5], told.append)
    assert rig.tier.table.state_of(5) is SlotState.READY


def test_fetch_of_more_than_there_is_room_for_is_refused(make: MakeRig) -> None:
    rig = make(slots=2)
    with pytest.raises(RuntimeError, match="slots are taken"):
        rig.tier.fetch([0, 1, 2], lambda _key: None)
    assert rig.state() == Counter({SlotState.READY: 2})


def test_a_smaller_tier_gives_memory_back_and_grows_again(make: MakeRig) -> None:
    rig = make(slots=5)
    rig.step(range(5))
    rig.tier.resize(2)
    assert rig.state() == Counter({SlotState.READY: 2})
    assert sorted(rig.tier.table) == [3, 4]
    lying = {rig.tier.table.slot_of(key) for key in (3, 4)}
    assert all(not rig.arena.view(slot, 3 * PAGE).any() for slot in range(5) if slot not in lying)
    rig.step(range(EXPERTS))
    assert len(set(rig.tier.table)) == 2
    rig.tier.resize(99)
    rig.step(range(EXPERTS))
    assert len(set(rig.tier.table)) == 5


def test_a_closed_engine_leaves_a_whole_tier(make: MakeRig) -> None:
    rig = make(slots=2)
    rig.step([1, 2])
    rig.engine.close()
    with pytest.raises(ClosedError):
        rig.step([3])
    rig.tier.abandon()
    assert rig.state() == Counter({SlotState.READY: 1}), "one gave way, nothing came"
    rig.tier.release_memory()
    assert rig.tier.borrow([1]) == ([], [1]), "memory that was given back was lent"
    assert not rig.state()


@pytest.mark.parametrize("damage", ["policy forgets", "policy invents", "ticket lost"])
def test_check_sees_what_does_not_agree(make: MakeRig, damage: str) -> None:
    rig = make(slots=3)
    rig.step([1, 2])
    rig.tier.start_loads([3])
    rig.tier.check()
    if damage == "policy forgets":
        rig.tier.policy.on_evict(1)
    elif damage == "policy invents":
        rig.tier.policy.on_insert(9)
    else:
        rig.tier._tickets.clear()
    with pytest.raises(AssertionError):
        rig.tier.check()


def test_a_forked_child_reads_again_what_was_on_its_way(make: MakeRig) -> None:
    rig = make(slots=4, threads=1)
    rig.step([0])
    gate = Gate()
    rig.reader.before_read = gate
    rig.tier.start_loads([1, 2], Urgency.SOON)
    gate.wait_for(1)
    hold = rig.engine.hold

    def open_and_hold() -> None:
        gate.open()
        hold()

    rig.engine.hold = open_and_hold  # type: ignore[method-assign]

    def child() -> None:
        rig.tier.check()
        rig.step([0, 1, 2, 3, 4, 5])
        rig.tier.check()

    assert exit_code_of(child) == 0
    rig.step([0, 1, 2, 3, 4, 5])
    rig.tier.check()


def test_slabs_are_given_up_one_by_one() -> None:
    rig = Rig(slots=1)
    device = HostDevice()
    device.slab_nbytes = 2 * 3 * PAGE
    arena = Arena(device, 3 * PAGE, 5)
    tier = ExpertTier(arena, LruPolicy(), rig.engine, rig.locate, lambda key: PAGES[key] * PAGE)
    tier.fetch(range(5), lambda _key: None)
    tier.start_loads([5], Urgency.SOON)
    assert [tier.give_up_slab() for _ in range(3)] == [1, 2, 0]
    tier.check()
    assert tier.table.usable_slots == 2
    resident, missing = tier.borrow([*range(6)])
    assert len(resident) <= 2
    assert len(resident) + len(missing) == 6
    tier.give_back(resident)
    tier.start_loads(missing[:2])
    arrived = tier.collect(missing[:2])
    tier.give_back(arrived)
    with pytest.raises(RuntimeError, match="cannot be evicted"):
        tier.evict(missing[-1])
    tier.evict(arrived[0])
    assert not tier.holds(arrived[0])
    tier.check()
    rig.engine.close()
