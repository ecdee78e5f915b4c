"""Least frequently used, with decay: popularity that forgets."""

from __future__ import annotations

import numpy as np

from cpu_kernels.compiling.compiler import direct
from prefetch.policies import visit_kernel as kernel
from prefetch.policies.geometry import Geometry
from prefetch.policies.valued import Floats, Ints, ValuedPolicy


class LfuPolicy(ValuedPolicy):
    """Value = cost x frequency; a use counts 1, and each decoded token of a layer multiplies what was by `decay`.

    A prefill is one observation, weighted with the tokens' shares: it shows what is popular and no more.
    """

    def __init__(self, geometry: Geometry, decay: float = 0.98) -> None:
        """Start with no uses.

        Args:
            geometry: the experts.
            decay: between 0 (the last use only) and 1 (nothing is forgotten).
        """
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay={decay}: expected 0 to 1")
        super().__init__(geometry)
        self.decay = decay
        self._frequency: Floats = np.zeros((1, geometry.total))
        self._blend = direct(kernel.blend)

    def _observe(self, visit: Ints, shares: Floats) -> None:
        self._blend(visit, shares, self._table, self._frequency, self.decay, 1.0)
