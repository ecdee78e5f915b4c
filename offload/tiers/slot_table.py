"""What lies in which slot: the one place that knows.

A slot is free → loading → ready → in use → ready → free; a retired slot has given its memory back and is free
again after `restore`. The table moves keys and states only. It is used from one thread at a time (the runtime's
step lock); readers never touch it, they finish tickets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from enum import Enum


class SlotState(Enum):
    """The state of one slot."""

    FREE = "free"
    LOADING = "loading"
    READY = "ready"
    IN_USE = "in use"
    RETIRED = "retired"


class SlotTable:
    """Slots of one tier and the expert keys that own them.

    Attributes:
        count: slots, retired ones included.
        version: another number after every change of who has arrived, and where.
        moved: keys that arrived or left; for whoever keeps a copy of who is where, and takes them out.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._state = [SlotState.FREE] * count
        self._key: list[int | None] = [None] * count
        self._slot: dict[int, int] = {}
        self._free = list(range(count - 1, -1, -1))
        self._retired: list[int] = []
        self._pinned: set[int] = set()
        self.version = 0
        self.moved: set[int] = set()

    def slot_of(self, key: int) -> int | None:
        """The slot that `key` owns, whatever its state."""
        return self._slot.get(key)

    def state_of(self, key: int) -> SlotState:
        """The state of the key's slot; FREE where it owns none."""
        slot = self._slot.get(key)
        return SlotState.FREE if slot is None else self._state[slot]

    @property
    def pinned(self) -> set[int]:
        """Keys that must not be evicted now: loading or in use. Not a copy; do not change it."""
        return self._pinned

    @property
    def free_slots(self) -> int:
        """Slots that `begin_load` can hand out."""
        return len(self._free)

    @property
    def usable_slots(self) -> int:
        """Slots that are not retired."""
        return self.count - len(self._retired)

    def __len__(self) -> int:
        """Keys that own a slot."""
        return len(self._slot)

    def __iter__(self) -> Iterator[int]:
        """Keys that own a slot."""
        return iter(self._slot)

    def begin_load(self, key: int) -> int:
        """Free → loading: give `key` a free slot."""
        if key in self._slot:
            raise RuntimeError(f"expert {key} already owns slot {self._slot[key]}")
        slot = self._free.pop()
        self._state[slot] = SlotState.LOADING
        self._key[slot] = key
        self._slot[key] = slot
        self._pinned.add(key)
        return slot

    def finish_load(self, key: int) -> None:
        """Loading → ready."""
        self._state[self._slot_in(key, SlotState.LOADING)] = SlotState.READY
        self.version += 1
        self.moved.add(key)
        self._pinned.discard(key)

    def acquire(self, keys: Iterable[int]) -> tuple[list[int], list[int]]:
        """Ready → in use, whichever of `keys` are ready: (these, whose slots stay until `release`, the others)."""
        slots, states = self._slot, self._state
        ready, others = [], []
        for key in keys:
            slot = slots.get(key)
            if slot is not None and states[slot] is SlotState.READY:
                states[slot] = SlotState.IN_USE
                ready.append(key)
            else:
                others.append(key)
        self._pinned.update(ready)
        return ready, others

    def release(self, keys: Collection[int]) -> None:
        """In use → ready: all of `keys`, or none where one of them is not in use."""
        for slot in [self._slot_in(key, SlotState.IN_USE) for key in keys]:
            self._state[slot] = SlotState.READY
        self._pinned.difference_update(keys)

    def evict(self, key: int) -> int:
        """Ready → free, or loading → free after a failed load: the slot that became free."""
        slot = self._slot.get(key)
        if slot is None or self._state[slot] not in (SlotState.READY, SlotState.LOADING):
            raise RuntimeError(f"expert {key} cannot be evicted: {self.state_of(key).value}")
        self.version += 1
        self.moved.add(key)
        del self._slot[key]
        self._pinned.discard(key)
        self._key[slot] = None
        self._state[slot] = SlotState.FREE
        self._free.append(slot)
        return slot

    def key_of(self, slot: int) -> int | None:
        """The key that owns a slot."""
        return self._key[slot]

    def last_usable(self) -> int:
        """The highest slot that is not retired."""
        return max(slot for slot in range(self.count) if self._state[slot] is not SlotState.RETIRED)

    def retire(self, slot: int | None = None) -> int:
        """Free → retired: take a free slot out of use, any one or the one that is named; the slot."""
        if slot is None:
            slot = self._free.pop()
        else:
            self._free.remove(slot)
        self._state[slot] = SlotState.RETIRED
        self._retired.append(slot)
        return slot

    def restore(self) -> int:
        """Retired → free: take one slot back into use; the slot."""
        slot = self._retired.pop()
        self._state[slot] = SlotState.FREE
        self._free.append(slot)
        return slot

    def recover(self, loaded: Collection[int]) -> None:
        """Whatever call was interrupted, wherever: a table that is consistent, in which no key is in use or loading.

        Experts that were ready or in use are ready.

        Args:
            loaded: keys whose load has finished: they are ready; others that were loading are free.
        """
        self.version += 1
        self.moved.update(self._slot)
        kept = (SlotState.READY, SlotState.IN_USE)
        self._slot.clear()
        self._free.clear()
        self._retired.clear()
        self._pinned.clear()
        for slot in reversed(range(self.count)):
            key, state = self._key[slot], self._state[slot]
            if key is not None and (state in kept or (state is SlotState.LOADING and key in loaded)):
                self._state[slot] = SlotState.READY
                self._slot[key] = slot
                continue
            self._key[slot] = None
            if state is SlotState.RETIRED:
                self._retired.append(slot)
            else:
                self._state[slot] = SlotState.FREE
                self._free.append(slot)

    def _slot_in(self, key: int, expected: SlotState) -> int:
        slot = self._slot.get(key)
        if slot is None or self._state[slot] is not expected:
            raise RuntimeError(f"expert {key} is {self.state_of(key).value}, expected {expected.value}")
        return slot

    def check(self) -> None:
        """Prove: resident + free + retired = total, no expert twice, no slot lost, pins match states.

        Raises:
            AssertionError: naming the first slot or key that breaks it.
        """
        owned = (SlotState.LOADING, SlotState.READY, SlotState.IN_USE)
        for slot, (state, key) in enumerate(zip(self._state, self._key, strict=True)):
            if (state in owned) != (key is not None):
                raise AssertionError(f"slot {slot} is {state.value} and owned by {key}")
            if key is not None and self._slot.get(key) != slot:
                raise AssertionError(f"slot {slot} says expert {key}, which owns slot {self._slot.get(key)}")
        for key, slot in self._slot.items():
            if self._key[slot] != key:
                raise AssertionError(f"expert {key} says slot {slot}, which expert {self._key[slot]} owns")
        for state, listed in ((SlotState.FREE, self._free), (SlotState.RETIRED, self._retired)):
            in_state = [slot for slot in range(self.count) if self._state[slot] is state]
            if sorted(listed) != in_state:
                raise AssertionError(
                    f"slots listed as {state.value} are {sorted(listed)}, those that are so {in_state}"
                )
        should_be = {k for k, s in self._slot.items() if self._state[s] in (SlotState.LOADING, SlotState.IN_USE)}
        if should_be != self._pinned:
            raise AssertionError(f"pins {sorted(self._pinned)} differ from states {sorted(should_be)}")
