"""Frequency x recency."""

from __future__ import annotations

import numpy as np

from prefetch.policies.geometry import Geometry
from prefetch.policies.valued import Floats, Ints, ValuedPolicy


class FrequencyRecencyPolicy(ValuedPolicy):
    """Value = cost x frequency / (tokens since the last use + 1), the frequency decaying as in `LfuPolicy`."""

    def __init__(self, geometry: Geometry, decay: float = 0.98) -> None:
        """Start with no uses; `decay` as in `LfuPolicy`."""
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay={decay}: expected 0 to 1")
        super().__init__(geometry)
        self.decay = decay
        self._frequency: Floats = np.zeros(geometry.total)
        self._tokens_since: Floats = np.zeros(geometry.total)

    def _observe(self, keys: Ints, shares: Floats | None) -> None:
        _, first, end = self.layer_range(int(keys[0]))
        frequency, since = self._frequency[first:end], self._tokens_since[first:end]
        frequency *= self.decay
        self._frequency[keys] += 1.0 if shares is None else shares
        since += 1.0
        # A prefill says little about what the next token needs: only decoded uses are recent.
        if shares is None:
            self._tokens_since[keys] = 0.0
        cost = self.geometry.relative_cost[first:end]
        np.divide(frequency * cost, since + 1.0, out=self.values[first:end])
