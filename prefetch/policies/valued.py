"""What policies share that give every expert a value and evict the least."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from prefetch.policies.base import CachePolicy
from prefetch.policies.geometry import Geometry
from prefetch.policies.selection_kernel import COST, FIXED, LAYER_OF, LAYER_ROWS, LIVE, ROWS, SCALE, VALUE, select

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_DECODED: Floats = np.empty(0)
_NO_QUOTAS: Ints = np.empty(0, np.int64)


class ValuedPolicy(CachePolicy):
    """Evicts the resident expert of least value; of equal ones the one unused for longest. Values outlive eviction.

    A subclass keeps `values` (by key) and, where it wants, `layer_scale` (by layer, what values are multiplied with)
    and `fixed` (by key, what is added then) up to date, in `_observe`. Infinite ones are not allowed. All three are
    views of the tables that kernels get: each array that is handed to a kernel takes part of a microsecond.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.slots = geometry.total
        self._first_keys = geometry.first_keys
        self._ranges = list(zip(geometry.first_keys.tolist(), geometry.first_keys.tolist()[1:], strict=False))
        self._layer_of = geometry.layer_of.tolist()
        total = geometry.total
        self._table: Floats = np.zeros((ROWS, total))
        self._table[LIVE] = np.inf
        self._table[COST], self._table[LAYER_OF] = geometry.relative_cost, geometry.layer_of
        self._per_layer: Floats = np.full((LAYER_ROWS, geometry.layers), np.inf)
        self._per_layer[SCALE] = 1.0
        self.values, self.fixed = self._table[VALUE], self._table[FIXED]
        self.layer_scale = self._per_layer[SCALE]
        self._clock = 0
        self._here: set[int] = set()
        # What `select` was not told yet: who came (the key) and left (-1 - key), and layers of new values.
        self._moved: list[int] = []
        self._changed: set[int] = set()

    def on_route(self, keys: Sequence[int], shares: Sequence[float] | None = None) -> None:
        """Notes the use and values it."""
        if not len(keys):
            return
        self._clock += 1
        layer = self._layer_of[keys[0]]
        visit = np.array([layer, *self._ranges[layer], self._clock, *keys], np.int64)
        self._observe(visit, _DECODED if shares is None else np.array(shares, np.float64))
        self._changed.add(layer)

    @abstractmethod
    def _observe(self, visit: Ints, shares: Floats) -> None:
        """A layer was routed.

        Args:
            visit: int64 [VISIT_KEYS + n], see `visit_kernel`; n is at least 1.
            shares: float64 [n], as in `on_route`; of no elements for decoded tokens.
        """

    def refresh_layer(self, layer: int) -> None:
        """`values` or `fixed` of a layer changed elsewhere than in `_observe`."""
        self._changed.add(layer)

    def on_insert(self, key: int) -> None:
        """`key` is resident; to insert what is resident changes nothing."""
        if key not in self._here:
            self._here.add(key)
            self._moved.append(key)

    def on_evict(self, key: int) -> None:
        """`key` is not resident any more; its value stays.

        Raises:
            KeyError: it was not resident.
        """
        self._here.remove(key)
        self._moved.append(-1 - key)

    @property
    def residents(self) -> int:
        """Resident keys."""
        return len(self._here)

    def on_resize(self, slots: int) -> None:
        """Notes the number of slots."""
        self.slots = slots

    def worth(self, key: int) -> float | None:
        """The value that eviction compares."""
        return float(self.values[key] * self.layer_scale[self._layer_of[key]] + self.fixed[key])

    def victim(self, pinned: Collection[int]) -> int | None:
        """The resident key of least value that is not pinned."""
        found = self.victims(pinned, 1)
        return found[0] if found else None

    def victims(self, pinned: Collection[int], count: int) -> list[int]:
        """In one call: those of least value."""
        return self.victims_above(_NO_QUOTAS, pinned, count)

    def victims_above(self, above: Ints, pinned: Collection[int], count: int) -> list[int]:
        """As `victims`; where `above`, int64 [layers], names layers that hold so many too many, from these first."""
        count = min(count, self.geometry.total)
        if count <= 0:
            return []
        moved, changed = self._moved, self._changed
        # What happened is told all at once, for a call costs more than its work.
        told = np.array([len(moved), len(changed), *moved, *changed, *pinned], np.int64)
        moved.clear()
        changed.clear()
        found = np.empty(count, np.int64)
        size = select(self._table, self._per_layer, self._first_keys, told, above, found)
        keys: list[int] = found[:size].tolist()
        return keys
