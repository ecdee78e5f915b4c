"""Workload windows: DALI's cache (arXiv 2602.03495)."""

from __future__ import annotations

import numpy as np

from prefetch.policies.geometry import Geometry
from prefetch.policies.valued import Floats, Ints, ValuedPolicy


class WindowPolicy(ValuedPolicy):
    """Value = uses in the last complete window of w tokens, and those of the window that runs; evicts the least busy.

    As published, experts are exchanged in the background at the end of a window; here the same ranking says what makes
    room when something is read. Value x cost of a miss.
    """

    def __init__(self, geometry: Geometry, window: int = 16) -> None:
        """Start with empty windows of `window` decoded tokens, at least one."""
        if window < 1:
            raise ValueError(f"window={window}: expected at least one token")
        super().__init__(geometry)
        self.window = window
        self._before: Floats = np.zeros(geometry.total)
        self._running: Floats = np.zeros(geometry.total)
        self._tokens = np.zeros(geometry.layers, np.int64)

    def _observe(self, keys: Ints, shares: Floats | None) -> None:
        layer, first, end = self.layer_range(int(keys[0]))
        running, before = self._running[first:end], self._before[first:end]
        if self._tokens[layer] >= self.window:
            before[:] = running
            running[:] = 0.0
            self._tokens[layer] = 0
        self._tokens[layer] += 1
        self._running[keys] += 1.0 if shares is None else shares
        np.multiply(before + running, self.geometry.relative_cost[first:end], out=self.values[first:end])
