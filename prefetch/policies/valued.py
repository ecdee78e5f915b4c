"""What policies share that give every expert a value and evict the least."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from prefetch.policies.base import CachePolicy
from prefetch.policies.geometry import Geometry
from prefetch.policies.selection_kernel import least

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class ValuedPolicy(CachePolicy):
    """Evicts the resident expert of least value; of equal ones the one unused for longest. Values outlive eviction.

    A subclass keeps `values` (float64 by key) up to date, at any time before `victim` asks; `_refresh` is called first.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.values: Floats = np.zeros(geometry.total)
        self.slots = geometry.total
        self._used_at = np.zeros(geometry.total, np.int64)
        self._clock = 0
        self._members = np.zeros(geometry.total, np.int64)
        self._place: dict[int, int] = {}
        self._held = np.zeros(geometry.total, np.bool_)

    def layer_range(self, keys: Sequence[int]) -> tuple[int, int, int]:
        """(layer, its first key, its end) of a layer's keys, of which there is at least one."""
        layer = int(self.geometry.layer_of[keys[0]])
        first_keys = self.geometry.first_keys
        return layer, int(first_keys[layer]), int(first_keys[layer + 1])

    def on_route(self, keys: Sequence[int], shares: Sequence[float] | None = None) -> None:
        """Notes the use, then lets `_observe` value it."""
        if not len(keys):
            return
        self._clock += 1
        used = np.asarray(keys, np.int64)
        self._used_at[used] = self._clock
        self._observe(used, None if shares is None else np.asarray(shares, np.float64))

    def _observe(self, keys: Ints, shares: Floats | None) -> None:
        """A layer was routed to `keys`; shares as in `on_route`."""

    def _refresh(self) -> None:
        """Bring `values` up to date: a victim is to be chosen."""

    def on_insert(self, key: int) -> None:
        """`key` is resident; to insert what is resident changes nothing."""
        if key in self._place:
            return
        place = len(self._place)
        self._members[place] = key
        self._place[key] = place

    def on_evict(self, key: int) -> None:
        """`key` is not resident any more; its value stays.

        Raises:
            KeyError: it was not resident.
        """
        place = self._place.pop(key)
        last = int(self._members[len(self._place)])
        if last != key:
            self._members[place] = last
            self._place[last] = place

    def on_resize(self, slots: int) -> None:
        """Notes the number of slots."""
        self.slots = slots

    def is_resident(self, key: int) -> bool:
        """Whether `key` has a slot."""
        return key in self._place

    @property
    def resident_count(self) -> int:
        """Keys that have a slot."""
        return len(self._place)

    def victim(self, pinned: Collection[int]) -> int | None:
        """The resident key of least value that is not pinned."""
        found = self.victims(pinned, 1)
        return found[0] if found else None

    def victims(self, pinned: Collection[int], count: int) -> list[int]:
        """In one pass over the resident keys."""
        self._refresh()
        held = np.fromiter(pinned, np.int64, len(pinned))
        # Keys that are pinned but unknown have no place in the arrays.
        held = held[(held >= 0) & (held < self.geometry.total)]
        found = np.empty(max(0, min(count, len(self._place))), np.int64)
        if not len(found):
            return []
        size = least(self.values, self._used_at, self._members, len(self._place), self._held, held, found)
        keys: list[int] = found[:size].tolist()
        return keys
