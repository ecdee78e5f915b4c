"""Per-layer quotas over a policy that values experts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

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
            inner: ranks experts; its quotas are set.
            geometry: the experts.
            whole_layers: shallow layers that are kept whole; 0 shares evenly.
        """
        self.inner = inner
        self.wants_scores = inner.wants_scores
        self.geometry = geometry
        self.whole_layers = whole_layers
        self.on_resize(geometry.total)

    def on_resize(self, slots: int) -> None:
        """Shares the slots out anew."""
        self.quotas = shallow_first(self.geometry, slots, self.whole_layers)
        """Slots that each layer may hold before it is the first to give one up."""
        self.inner.set_quotas(self.quotas)
        self.inner.on_resize(slots)

    def on_route(self, keys: Sequence[int], shares: Sequence[float] | None = None) -> None:
        """For the inner policy."""
        self.inner.on_route(keys, shares)

    def on_scores(self, first_key: int, scores: Scores) -> None:
        """For the inner policy."""
        self.inner.on_scores(first_key, scores)

    def expected(self, first_key: int) -> Scores | None:
        """What the inner policy expects."""
        return self.inner.expected(first_key)

    def on_forecast(self, first_key: int, probabilities: Scores) -> None:
        """For the inner policy."""
        self.inner.on_forecast(first_key, probabilities)

    def worth(self, key: int) -> float | None:
        """As the inner policy says."""
        return self.inner.worth(key)

    def on_insert(self, key: int) -> None:
        """Counts towards its layer."""
        self.inner.on_insert(key)

    def on_evict(self, key: int) -> None:
        """Does not count any more."""
        self.inner.on_evict(key)

    def victim(self, pinned: Collection[int]) -> int | None:
        """From the layer the furthest above its quota that has an unpinned key."""
        return self.inner.victim(pinned)

    def victims(self, pinned: Collection[int], count: int) -> list[int]:
        """From the layer the furthest above its quota as many as it is above, then from the next; then from any.

        Of layers that are equally far above, the deepest comes first.
        """
        return self.inner.victims(pinned, count)
