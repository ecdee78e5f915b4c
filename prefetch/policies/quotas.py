"""Per-layer quotas over a policy that values experts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from prefetch.policies.base import CachePolicy, Scores
from prefetch.policies.geometry import Geometry
from prefetch.policies.valued import ValuedPolicy


def shallow_first(geometry: Geometry, slots: int, whole_layers: int) -> tuple[int, ...]:
    """Fate's shares: the first layers whole as far as slots go, the rest of the slots evenly over the other layers."""
    quotas = [0] * geometry.layers
    left = slots
    for layer in range(min(whole_layers, geometry.layers)):
        quotas[layer] = min(left, geometry.counts[layer])
        left -= quotas[layer]
    rest = range(min(whole_layers, geometry.layers), geometry.layers)
    for place, layer in enumerate(rest):
        quotas[layer] = left // len(rest) + (place < left % len(rest))
    return tuple(quotas)


class QuotaPolicy(CachePolicy):
    """Evicts from a layer that holds more than its quota, the most above it first; within the layer the inner policy
    says whom. Where no layer is above its quota, the inner policy chooses freely.
    """

    def __init__(self, inner: ValuedPolicy, geometry: Geometry, whole_layers: int = 0) -> None:
        """Share slots out as `shallow_first` does.

        Args:
            inner: ranks experts.
            geometry: the experts.
            whole_layers: shallow layers that are kept whole; 0 shares evenly.
        """
        self.inner = inner
        self.geometry = geometry
        self.whole_layers = whole_layers
        self._quotas = np.array(shallow_first(geometry, geometry.total, whole_layers), np.int64)
        self._held = np.zeros(geometry.layers, np.int64)
        self._layer_of = geometry.layer_of.tolist()

    @property
    def quotas(self) -> tuple[int, ...]:
        """Slots that each layer may hold before it is the first to give one up."""
        return tuple(self._quotas.tolist())

    def on_resize(self, slots: int) -> None:
        """Shares the slots out anew."""
        self._quotas[:] = shallow_first(self.geometry, slots, self.whole_layers)
        self.inner.on_resize(slots)

    def on_route(self, keys: Sequence[int], shares: Sequence[float] | None = None) -> None:
        """For the inner policy."""
        self.inner.on_route(keys, shares)

    def on_scores(self, first_key: int, scores: Scores) -> None:
        """For the inner policy."""
        self.inner.on_scores(first_key, scores)

    def on_forecast(self, first_key: int, probabilities: Scores) -> None:
        """For the inner policy."""
        self.inner.on_forecast(first_key, probabilities)

    def worth(self, key: int) -> float | None:
        """As the inner policy says."""
        return self.inner.worth(key)

    def on_insert(self, key: int) -> None:
        """Counts towards its layer."""
        before = self.inner.residents
        self.inner.on_insert(key)
        self._held[self._layer_of[key]] += self.inner.residents - before

    def on_evict(self, key: int) -> None:
        """Does not count any more."""
        self.inner.on_evict(key)
        self._held[self._layer_of[key]] -= 1

    def victim(self, pinned: Collection[int]) -> int | None:
        """From the layer the furthest above its quota that has an unpinned key."""
        found = self.victims(pinned, 1)
        return found[0] if found else None

    def victims(self, pinned: Collection[int], count: int) -> list[int]:
        """From the layer the furthest above its quota as many as it is above, then from the next; then from any.

        Of layers that are equally far above, the deepest comes first.
        """
        return self.inner.victims_above(self._held - self._quotas, pinned, count)
