"""Minus recent score: HybriMoE's cache (arXiv 2504.05897, section 4.4)."""

from __future__ import annotations

import numpy as np

from prefetch.policies.base import Scores
from prefetch.policies.geometry import Geometry
from prefetch.policies.valued import Floats, Ints, ValuedPolicy


class MrsPolicy(ValuedPolicy):
    """S = alpha TopP(s) + (1 - alpha) S, with s the router's scores; evicts the lowest S.

    TopP keeps the p highest and sets others to 0; p is twice the number of experts that were activated. Where nobody
    tells of scores (`on_scores`), uses take their place. The value is S x cost of a miss.
    """

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
        self.scores: Floats = np.zeros(geometry.total)
        self._activated = np.zeros(geometry.layers, np.int64)
        self._scored = False

    def _observe(self, keys: Ints, shares: Floats | None) -> None:
        layer, first, end = self.layer_range(int(keys[0]))
        self._activated[layer] = len(keys)
        if not self._scored:
            used = np.zeros(end - first)
            used[keys - first] = 1.0 if shares is None else shares
            self._blend(first, used)

    def on_scores(self, first_key: int, scores: Scores) -> None:
        """Blends the p highest scores in."""
        self._scored = True
        top = 2 * int(self._activated[self.geometry.layer_of[first_key]])
        kept = np.asarray(scores, np.float64)
        if 0 < top < len(kept):
            kept = np.where(kept >= np.partition(kept, -top)[-top], kept, 0.0)
        self._blend(first_key, kept)

    def _blend(self, first: int, newest: Floats) -> None:
        end = first + len(newest)
        scores = self.scores[first:end]
        scores *= 1.0 - self.alpha
        scores += self.alpha * newest
        np.multiply(scores, self.geometry.relative_cost[first:end], out=self.values[first:end])
        self.refresh_layer(self._layer_of[first])
