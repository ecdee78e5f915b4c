"""Minus recent score: HybriMoE's cache (arXiv 2504.05897, section 4.4)."""

from __future__ import annotations

import numpy as np

from cpu_kernels.compiling.compiler import direct
from prefetch.policies import visit_kernel as kernel
from prefetch.policies.base import Scores
from prefetch.policies.geometry import Geometry
from prefetch.policies.valued import Floats, Ints, ValuedPolicy
from prefetch.policies.visit_kernel import COUNT, LAYER


class MrsPolicy(ValuedPolicy):
    """S = alpha TopP(s) + (1 - alpha) S, with s the router's scores; evicts the lowest S.

    TopP keeps the p highest and sets others to 0; p is twice the number of experts that were activated. Where nobody
    tells of scores (`on_scores`), uses take their place. The value is S x cost of a miss.
    """

    wants_scores = True

    def __init__(self, geometry: Geometry, alpha: float = 0.5) -> None:
        """Start with scores of 0.

        Args:
            geometry: the experts.
            alpha: weight of the newest scores, above 0 and at most 1; 0.5 in the released code.
        """
        if not 0.0 < alpha <= 1.0:
            raise ValueError(f"alpha={alpha}: expected above 0, at most 1")
        super().__init__(geometry)
        self.alpha = alpha
        self._scores: Floats = np.zeros((1, geometry.total))
        self._activated = [0] * geometry.layers
        self._scored = False
        self._blend, self._touch = direct(kernel.blend), direct(kernel.touch)

    @property
    def scores(self) -> Floats:
        """float64 [experts of all layers], S."""
        scores: Floats = self._scores[0]
        return scores

    def _observe(self, visit: Ints, shares: Floats) -> None:
        self._activated[visit[LAYER]] = int(visit[COUNT])
        if self._scored:
            self._touch(visit, self._table)
        else:
            self._blend(visit, shares, self._table, self._scores, 1.0 - self.alpha, self.alpha)

    def on_scores(self, first_key: int, scores: Scores) -> None:
        """Blends the p highest scores in."""
        self._scored = True
        layer = self._layer_of[first_key]
        top = 2 * self._activated[layer]
        kept = np.asarray(scores, np.float64)
        if 0 < top < len(kept):
            kept = np.where(kept >= np.partition(kept, -top)[-top], kept, 0.0)
        end = first_key + len(kept)
        blended = self.scores[first_key:end]
        blended *= 1.0 - self.alpha
        blended += self.alpha * kept
        np.multiply(blended, self.geometry.relative_cost[first_key:end], out=self.values[first_key:end])
        self.refresh_layer(layer)
