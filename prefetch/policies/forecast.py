"""The default policy: keep what is most probably needed again, and soonest."""

from __future__ import annotations

import numpy as np

from prefetch.policies.base import Scores
from prefetch.policies.forecast_kernel import BIAS, FEATURES, INPUTS, SINCE, visit
from prefetch.policies.geometry import Geometry
from prefetch.policies.valued import Floats, Ints, ValuedPolicy

_START_WEIGHTS = (0.5, 0.3, 0.1, 0.3, -0.3, 0.2)
"""Of long, middle and short shares, last use, visits since and bias: near what traces of a trained model teach."""

_DECAYS_AND_RATE = (0.99, 0.9, 0.6, 0.05)

_UNSEEN_VISITS = 20.0
_PATIENCE_PASSES = 0.3

_DECODE = np.empty(0)


class ForecastPolicy(ValuedPolicy):
    """Value = cost x P(the layer's next visit needs it) / (time until that visit + 0.3 passes).

    The probability is a logistic regression on how often the expert was needed over about 100, 10 and 2.5 tokens,
    whether the last token needed it and how long ago one did; it learns with every token, by layer. Where a predictor
    has spoken of a layer still to come in this pass (`on_forecast`), its word counts instead. Time matters because a
    slot that is needed in the next layer earns its place sooner than one of the layer just passed.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.weights: Floats = np.tile(np.array(_START_WEIGHTS), (geometry.layers, 1))
        self.probabilities: Floats = np.full(geometry.total, 0.1)
        self._features = np.zeros((geometry.total, FEATURES))
        self._features[:, SINCE] = _UNSEEN_VISITS
        self._inputs = np.zeros((geometry.total, INPUTS))
        self._inputs[:, BIAS] = 1.0
        self._rates = np.array(_DECAYS_AND_RATE)
        self._cost = geometry.relative_cost
        passes = (np.arange(geometry.layers) + 1) / geometry.layers
        # A layer's scale is its place in this, counted from the layer that was visited last.
        self._scales = np.tile(1.0 / (passes + _PATIENCE_PASSES), 2)
        self.layer_scale = self._scales[: geometry.layers].copy()
        np.multiply(self._cost, self.probabilities, out=self.values)

    def _observe(self, keys: Ints, shares: Floats | None) -> None:
        layer, first, end = self.layer_range(int(keys[0]))
        visit(
            self._features[first:end], self._inputs[first:end], self.weights[layer], self.probabilities[first:end],
            keys, _DECODE if shares is None else shares, first, self._rates,
        )  # fmt: skip
        np.multiply(self._cost[first:end], self.probabilities[first:end], out=self.values[first:end])
        layers = self.geometry.layers
        start = layers - 1 - layer
        self.layer_scale[:] = self._scales[start : start + layers]

    def on_forecast(self, first_key: int, probabilities: Scores) -> None:
        """Counts until the layer is routed."""
        end = first_key + len(probabilities)
        np.multiply(self._cost[first_key:end], probabilities, out=self.values[first_key:end])
        self.refresh_layer(self._layer_of[first_key])
