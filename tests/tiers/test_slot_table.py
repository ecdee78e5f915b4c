"""The slot table against a dictionary, and its own check against every kind of damage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from offload.tiers.slot_table import SlotState, SlotTable

FREE, LOADING, READY, IN_USE = SlotState.FREE, SlotState.LOADING, SlotState.READY, SlotState.IN_USE
KEYS = st.integers(0, 7)


def test_a_named_slot_is_retired() -> None:
    table = SlotTable(4)
    slot = table.begin_load(5)
    table.finish_load(5)
    assert table.key_of(slot) == 5
    free = next(other for other in range(4) if other != slot)
    assert table.retire(free) == free
    assert table.last_usable() == max({*range(4)} - {free})
    table.check()
    with pytest.raises(ValueError, match="not in list"):
        table.retire(slot)
    table.check()
    assert table.restore() == free


class SlotTableMachine(RuleBasedStateMachine):
    """Every call on any key: legal moves change the model, illegal ones raise and change nothing."""

    @initialize(count=st.integers(1, 5))
    def make(self, count: int) -> None:
        self.table = SlotTable(count)
        self.states: dict[int, SlotState] = {}
        self.slots: dict[int, int] = {}
        self.retired: set[int] = set()

    @property
    def free(self) -> int:
        return self.table.count - len(self.states) - len(self.retired)

    def move(self, key: int, call: Callable[[int], object], allowed: set[SlotState], to: SlotState | None) -> None:
        if self.states.get(key, FREE) not in allowed:
            with pytest.raises(RuntimeError, match=f"expert {key}"):
                call(key)
            return
        found = call(key)
        assert found in (None, self.slots[key])
        if to is None:
            del self.states[key], self.slots[key]
        else:
            self.states[key] = to

    @rule(key=KEYS)
    def begin_load(self, key: int) -> None:
        if key in self.states:
            with pytest.raises(RuntimeError, match="already owns"):
                self.table.begin_load(key)
        elif not self.free:
            with pytest.raises(IndexError):
                self.table.begin_load(key)
        else:
            slot = self.table.begin_load(key)
            assert slot not in self.slots.values()
            assert slot not in self.retired
            self.states[key], self.slots[key] = LOADING, slot

    @rule(key=KEYS)
    def finish_load(self, key: int) -> None:
        self.move(key, self.table.finish_load, {LOADING}, READY)

    @rule(keys=st.lists(KEYS, unique=True))
    def acquire(self, keys: list[int]) -> None:
        ready = [key for key in keys if self.states.get(key) is READY]
        assert self.table.acquire(keys) == (ready, [key for key in keys if key not in ready])
        self.states.update(dict.fromkeys(ready, IN_USE))

    @rule(keys=st.lists(KEYS, unique=True))
    def release(self, keys: list[int]) -> None:
        idle = [key for key in keys if self.states.get(key) is not IN_USE]
        if idle:
            with pytest.raises(RuntimeError, match=f"expert {idle[0]}"):
                self.table.release(keys)
            return
        self.table.release(keys)
        self.states.update(dict.fromkeys(keys, READY))

    @rule(key=KEYS)
    def evict(self, key: int) -> None:
        self.move(key, self.table.evict, {READY, LOADING}, None)

    @rule()
    def retire(self) -> None:
        if self.free:
            slot = self.table.retire()
            assert slot not in self.slots.values()
            assert slot not in self.retired
            self.retired.add(slot)
        else:
            with pytest.raises(IndexError):
                self.table.retire()

    @rule()
    def restore(self) -> None:
        if self.retired:
            self.retired.remove(self.table.restore())
        else:
            with pytest.raises(IndexError):
                self.table.restore()

    @rule(loaded=st.sets(KEYS))
    def recover(self, loaded: set[int]) -> None:
        self.table.recover(loaded)
        self.states = {key: READY for key, state in self.states.items() if state is not LOADING or key in loaded}
        self.slots = {key: self.slots[key] for key in self.states}

    @invariant()
    def agrees(self) -> None:
        self.table.check()
        assert set(self.table) == set(self.states)
        for key in range(8):
            assert self.table.state_of(key) is self.states.get(key, FREE)
            assert self.table.slot_of(key) == self.slots.get(key)
        assert self.table.pinned == {key for key, state in self.states.items() if state in (LOADING, IN_USE)}
        assert self.table.free_slots == self.free
        assert self.table.usable_slots == self.table.count - len(self.retired)


TestSlotTable = SlotTableMachine.TestCase
TestSlotTable.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def sound_table() -> SlotTable:
    """Expert 10 is in use in slot 0, 11 ready in 1, 12 loading in 2; slot 3 is retired, 4 and 5 are free."""
    table = SlotTable(6)
    for key in (10, 11, 12):
        table.begin_load(key)
    table.finish_load(10)
    assert table.acquire([10]) == ([10], [])
    table.finish_load(11)
    table.retire()
    table.check()
    return table


def _lose_a_slot(table: SlotTable) -> None:
    table._free.pop()


def _free_a_slot_twice(table: SlotTable) -> None:
    table._free.append(table._free[0])


def _free_an_owned_slot(table: SlotTable) -> None:
    table._free[0] = 1


def _free_a_retired_slot(table: SlotTable) -> None:
    table._free.append(table._retired.pop())


def _lose_a_retired_slot(table: SlotTable) -> None:
    table._retired.clear()


def _leave_an_owner_on_a_free_slot(table: SlotTable) -> None:
    table._key[5] = 99


def _take_the_owner_away(table: SlotTable) -> None:
    table._key[1] = None


def _own_a_slot_twice(table: SlotTable) -> None:
    table._slot[99] = 1
    table._free.pop()


def _own_two_slots(table: SlotTable) -> None:
    slot = table._free.pop()
    table._key[slot], table._state[slot] = 11, READY


def _forget_an_expert(table: SlotTable) -> None:
    del table._slot[11]


def _swap_two_experts(table: SlotTable) -> None:
    table._slot[10], table._slot[11] = table._slot[11], table._slot[10]


def _drop_a_pin(table: SlotTable) -> None:
    table._pinned.remove(10)


def _pin_too_much(table: SlotTable) -> None:
    table._pinned.add(11)


def _change_a_state(table: SlotTable) -> None:
    table._state[1] = IN_USE


@pytest.mark.parametrize(
    "damage",
    [
        *(_lose_a_slot, _free_a_slot_twice, _free_an_owned_slot, _free_a_retired_slot, _lose_a_retired_slot),
        *(_leave_an_owner_on_a_free_slot, _take_the_owner_away, _own_a_slot_twice, _own_two_slots, _forget_an_expert),
        *(_swap_two_experts, _drop_a_pin, _pin_too_much, _change_a_state),
    ],
)
def test_check_sees_damage(damage: Callable[[SlotTable], None]) -> None:
    table = sound_table()
    damage(table)
    with pytest.raises(AssertionError):
        table.check()
