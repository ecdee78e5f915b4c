"""What policies share that give every expert a value and evict the least."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from prefetch.policies.base import CachePolicy
from prefetch.policies.geometry import Geometry
from prefetch.policies.selection_kernel import least, update

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class ValuedPolicy(CachePolicy):
    """Evicts the resident expert of least value; of equal ones the one unused for longest. Values outlive eviction.

    A subclass keeps `values` (float64 by key) and, where it wants, `layer_scale` (float64 by layer, which values are
    multiplied with) and `fixed` (float64 by key, what is added then) up to date, in `_observe`. Infinite ones are not
    allowed.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.values: Floats = np.zeros(geometry.total)
        self.layer_scale: Floats = np.ones(geometry.layers)
        self.fixed: Floats = np.zeros(geometry.total)
        self.slots = geometry.total
        self._first_keys = geometry.first_keys
        self._ranges = list(zip(geometry.first_keys.tolist(), geometry.first_keys.tolist()[1:], strict=False))
        self._layer_of = geometry.layer_of.tolist()
        self._used_at = np.zeros(geometry.total, np.int64)
        self._clock = 0
        self._here: set[int] = set()
        # What the kernels were not told yet: who came (the key) and left (-1 - key), and layers of new values.
        self._moved: list[int] = []
        self._changed: set[int] = set()
        self._layers = geometry.layer_of
        self._resident = np.zeros(geometry.total, np.bool_)
        self._live = np.full(geometry.total, np.inf)
        self._bounds = np.full((2, geometry.layers), np.inf)
        self._scaled = np.empty(geometry.total)

    def layer_range(self, key: int) -> tuple[int, int, int]:
        """(layer, its first key, its end) of the layer that `key` is of."""
        layer = self._layer_of[key]
        return (layer, *self._ranges[layer])

    def on_route(self, keys: Sequence[int], shares: Sequence[float] | None = None) -> None:
        """Notes the use, then lets `_observe` value it."""
        if not len(keys):
            return
        self._clock += 1
        used = np.array(keys, np.int64)
        self._used_at[used] = self._clock
        self._observe(used, None if shares is None else np.array(shares, np.float64))
        self.refresh_layer(self._layer_of[keys[0]])

    def refresh_layer(self, layer: int) -> None:
        """`values` or `fixed` of a layer changed elsewhere than in `_observe`."""
        self._changed.add(layer)

    def _update(self) -> None:
        """Tell the kernels what happened: all at once, for a call costs more than its work."""
        if self._moved or self._changed:
            moved = np.array(self._moved, np.int64)
            changed = np.array(list(self._changed), np.int64)
            self._moved.clear()
            self._changed.clear()
            update(
                self.values, self.fixed, self._used_at, self._resident, self._live, self._bounds, self._layers,
                self._first_keys, moved, changed,
            )  # fmt: skip

    def _observe(self, keys: Ints, shares: Floats | None) -> None:
        """A layer was routed to `keys`, of which there is at least one; shares as in `on_route`."""

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
        """In one pass over the keys."""
        return self._least(pinned, count, -1)

    def layer_victims(self, layer: int, pinned: Collection[int], count: int) -> list[int]:
        """As `victims`, of one layer alone."""
        return self._least(pinned, count, layer)

    def _least(self, pinned: Collection[int], count: int, layer: int) -> list[int]:
        count = min(count, self.geometry.total)
        if count <= 0:
            return []
        self._update()
        found = np.empty(count, np.int64)
        held = np.fromiter(pinned, np.int64, len(pinned))
        size = least(
            self._live, self.fixed, self._bounds, self._scaled, self.layer_scale, self._first_keys, layer, held, found
        )  # fmt: skip
        keys: list[int] = found[:size].tolist()
        return keys
