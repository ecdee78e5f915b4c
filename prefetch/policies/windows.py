"""Workload windows: DALI's cache (arXiv 2602.03495)."""

from __future__ import annotations

import numpy as np

from cpu_kernels.compiling.compiler import direct
from prefetch.policies import visit_kernel as kernel
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
        self._uses: Floats = np.zeros((2, geometry.total))
        self._tokens: Ints = np.zeros(geometry.layers, np.int64)
        self._count_window = direct(kernel.count_window)

    def _observe(self, visit: Ints, shares: Floats) -> None:
        self._count_window(visit, shares, self._table, self._uses, self._tokens, self.window)
