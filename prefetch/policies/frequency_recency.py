"""Frequency x recency."""

from __future__ import annotations

import numpy as np

from cpu_kernels.compiling.compiler import direct
from prefetch.policies import visit_kernel as kernel
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
        self._state: Floats = np.zeros((2, geometry.total))
        self._frequency_recency = direct(kernel.frequency_recency)

    def _observe(self, visit: Ints, shares: Floats) -> None:
        self._frequency_recency(visit, shares, self._table, self._state, self.decay)
