"""What policies share that give every expert a value and evict the least."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels.compiling.compiler import direct
from prefetch.packing import int64s
from prefetch.policies import selection_kernel as selection
from prefetch.policies.base import CachePolicy
from prefetch.policies.geometry import Geometry
from prefetch.policies.selection_kernel import COST, FIXED, LAYER_OF, LIVE, SCALE, VALUE
from prefetch.policies.visit_kernel import VISIT_KEYS

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_DECODED: Floats = np.empty(0)


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
        self._table: Floats = np.zeros((selection.ROWS, total))
        self._table[LIVE] = np.inf
        self._table[COST], self._table[LAYER_OF] = geometry.relative_cost, geometry.layer_of
        self._per_layer: Floats = np.full((selection.LAYER_ROWS, geometry.layers), np.inf)
        self._per_layer[SCALE] = 1.0
        self._per_layer[selection.HELD] = 0.0
        self._quotas: Ints = np.empty(0, np.int64)
        self._clock = 0
        self._here: set[int] = set()
        # What `select` was not told yet: who came (the key) and left (-1 - key), and layers of new values.
        self._moved: list[int] = []
        self._changed: set[int] = set()
        # What kernels are told and what they find lies in the same places each time.
        self._visit: Any = np.zeros(VISIT_KEYS + max(geometry.counts), np.int64)
        self._told: Any = np.zeros(selection.TOLD + total, np.int64)
        self._found: Any = np.zeros(total, np.int64)
        self._select = direct(selection.select)

    @property
    def values(self) -> Floats:
        """float64 [experts of all layers]."""
        values: Floats = self._table[VALUE]
        return values

    @property
    def fixed(self) -> Floats:
        """float64 [experts of all layers]."""
        fixed: Floats = self._table[FIXED]
        return fixed

    @property
    def layer_scale(self) -> Floats:
        """float64 [layers]."""
        scale: Floats = self._per_layer[SCALE]
        return scale

    def on_route(self, keys: Sequence[int], shares: Sequence[float] | None = None) -> None:
        """Notes the use and values it."""
        count = len(keys)
        if not count:
            return
        self._clock += 1
        layer = self._layer_of[keys[0]]
        first, end = self._ranges[layer]
        int64s(VISIT_KEYS + count).pack_into(self._visit, 0, layer, first, end, self._clock, count, *keys)
        self._observe(self._visit, _DECODED if shares is None else np.array(shares, np.float64))
        self._changed.add(layer)

    @abstractmethod
    def _observe(self, visit: Ints, shares: Floats) -> None:
        """A layer was routed.

        Args:
            visit: int64, see `visit_kernel`; of at least one key.
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

    def on_resize(self, slots: int) -> None:
        """Notes the number of slots."""
        self.slots = slots

    def set_quotas(self, quotas: Sequence[int]) -> None:
        """Evict first from layers that hold more than this, the furthest above it first; of none, from any layer."""
        self._quotas = np.array(quotas, np.int64)

    def worth(self, key: int) -> float | None:
        """The value that eviction compares."""
        table = self._table
        return float(table[VALUE, key] * self._per_layer[SCALE, self._layer_of[key]] + table[FIXED, key])

    def take_news(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What `select` was not told yet, for a kernel that tells it: who came or left, and layers of new values."""
        news = tuple(self._moved), tuple(self._changed)
        self._moved.clear()
        self._changed.clear()
        return news

    def victim(self, pinned: Collection[int]) -> int | None:
        """The resident key of least value that is not pinned."""
        found = self.victims(pinned, 1)
        return found[0] if found else None

    def victims(self, pinned: Collection[int], count: int) -> list[int]:
        """In one call: those of least value."""
        count = min(count, len(self._here))
        if count <= 0:
            return []
        # What happened is told all at once, for a call costs more than its work.
        moved, changed = self._moved, self._changed
        told = selection.TOLD + len(moved) + len(changed) + len(pinned)
        if told > len(self._told):
            self._told = np.zeros(2 * told, np.int64)
        int64s(told).pack_into(self._told, 0, len(moved), len(changed), len(pinned), count, *moved, *changed, *pinned)
        moved.clear()
        changed.clear()
        size = self._select(self._table, self._per_layer, self._first_keys, self._quotas, self._told, self._found)
        return list(int64s(size).unpack_from(self._found))
