"""LRU against a list that is searched."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from prefetch.policies.lru import MOST_ROUTED, LruPolicy

KEYS = st.integers(0, 11)


class LruMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.policy = LruPolicy()
        self.used_at: dict[int, int] = {}
        self.clock = 0

    def touch(self, key: int) -> None:
        self.clock += 1
        self.used_at[key] = self.clock

    def expected(self, pinned: set[int]) -> int | None:
        return min(set(self.used_at) - pinned, key=self.used_at.__getitem__, default=None)

    @rule(keys=st.lists(KEYS, unique=True))
    def route(self, keys: list[int]) -> None:
        self.policy.on_route(keys)
        for key in keys:
            if key in self.used_at:
                self.touch(key)

    @rule(key=KEYS)
    def insert(self, key: int) -> None:
        self.policy.on_insert(key)
        self.touch(key)

    @precondition(lambda self: self.used_at)
    @rule(data=st.data())
    def evict_any(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.used_at)))
        self.policy.on_evict(key)
        del self.used_at[key]

    @rule(pinned=st.sets(KEYS))
    def evict_victim(self, pinned: set[int]) -> None:
        victim = self.policy.victim(pinned)
        assert victim == self.expected(pinned)
        assert victim == self.policy.victim(pinned), "asking for a victim must not change anything"
        if victim is not None:
            self.policy.on_evict(victim)
            del self.used_at[victim]

    @rule()
    def order_agrees(self) -> None:
        """Asked for now and then: routings that nobody has asked for since add up."""
        pinned: set[int] = set()
        while (victim := self.policy.victim(pinned)) is not None:
            assert victim == self.expected(pinned)
            pinned.add(victim)
        assert pinned == set(self.used_at)


TestLru = LruMachine.TestCase
TestLru.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_routings_that_nobody_asks_for_are_bounded() -> None:
    policy = LruPolicy()
    for key in range(4):
        policy.on_insert(key)
    for turn in range(3 * MOST_ROUTED):
        policy.on_route([turn % 4, 7])
        assert len(policy._routed) <= MOST_ROUTED
    assert policy.victims((), 4) == [0, 1, 2, 3]
    policy.on_route([1])
    policy.on_evict(0)
    policy.on_insert(7)
    assert policy.victims((), 4) == [2, 3, 1, 7]
