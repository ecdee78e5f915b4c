"""The default policy: keep what is most probably needed again, and soonest."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from prefetch.learning import check_tables
from prefetch.policies.base import Scores
from prefetch.policies.forecast_kernel import BIAS, FEATURES, INPUTS, PATIENCE_PASSES, SINCE, learn, predict
from prefetch.policies.geometry import Geometry
from prefetch.policies.valued import Floats, Ints, ValuedPolicy

_START_WEIGHTS = (0.5, 0.3, 0.1, 0.3, -0.3, 0.2)
"""Of long, middle and short shares, last use, visits since and bias: near what traces of a trained model teach."""

_DECAYS_AND_RATES = (0.99, 0.9, 0.6, 0.05, 0.07)

_UNSEEN_VISITS = 20.0

_NOBODY = np.empty(0, np.int64)


_MOST_SOURCES = 256
"""Experts of other layers are sources of links as far as this goes: a layer's tables are read with every token."""


def _sources(geometry: Geometry, layer: int) -> list[int]:
    """Whose experts say what follows in a layer's next visit: its own, those of the layer before and of the first."""
    chosen, experts = [layer], geometry.counts[layer]
    for source in sorted({max(layer - 1, 0), 0} - {layer}, reverse=True):
        experts += geometry.counts[source]
        if experts <= _MOST_SOURCES:
            chosen.append(source)
    return chosen


class ForecastPolicy(ValuedPolicy):
    """Value = cost x mean of 1 / (time until it is needed + 0.3 passes).

    With probability p the layer's next visit needs the expert, else a later one, each with the share of about the last
    100 visits that did. Time matters because a slot that is needed in the next layer earns its place sooner than one of
    the layer just passed, and later visits because what this pass does not need the next one may.

    p is a logistic regression that learns with every token, by layer, from how often the expert was needed over about
    100, 10 and 2.5 tokens, whether the last token needed it and how long ago one did, and from which experts the token
    used here and, where layers are small, in the layer before and in the first: what follows what from one token to the
    next. Where a predictor has spoken of a layer still to come in this pass (`on_forecast`), its word is p instead.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        layers = geometry.layers
        self.weights: Floats = np.tile(np.array(_START_WEIGHTS), (layers, 1))
        self.probabilities: Floats = np.full(geometry.total, 0.1)
        self._sources = [_sources(geometry, layer) for layer in range(layers)]
        self.links = [
            np.zeros((sum(geometry.counts[source] for source in sources), count), np.float32)
            for sources, count in zip(self._sources, geometry.counts, strict=True)
        ]
        self._used: list[Ints] = [_NOBODY] * layers
        self._rows: list[Ints] = [_NOBODY] * layers
        self._later: Floats = np.zeros(geometry.total)
        self._features = np.zeros((geometry.total, FEATURES))
        self._features[:, SINCE] = _UNSEEN_VISITS
        self._inputs = np.zeros((geometry.total, INPUTS))
        self._inputs[:, BIAS] = 1.0
        self._rates = np.array(_DECAYS_AND_RATES)
        self._cost = geometry.relative_cost
        passes = (np.arange(layers) + 1) / layers
        # A layer's scale is its place in this, counted from the layer that was visited last.
        self._scales = np.tile(1.0 / (passes + PATIENCE_PASSES), 2)
        self.layer_scale = self._scales[:layers].copy()
        for first, end in self._ranges:
            self._value(first, end, self.probabilities[first:end])

    def _value(self, first: int, end: int, probabilities: Scores) -> None:
        """What keys `first` to `end` are worth if the layer's next visit needs them with these probabilities."""
        cost = self._cost[first:end]
        self.values[first:end] = cost * probabilities
        self.fixed[first:end] = cost * (1.0 - probabilities) * self._later[first:end]

    def _observe(self, keys: Ints, shares: Floats | None) -> None:
        layer, first, end = self.layer_range(int(keys[0]))
        decode = shares is None
        need = np.zeros(end - first)
        need[keys - first] = 1.0 if shares is None else shares
        inputs, probabilities = self._inputs[first:end], self.probabilities[first:end]
        weights, links = self.weights[layer], self.links[layer]
        if decode:
            learn(inputs, weights, links, self._rows[layer], probabilities, need, self._rates)
        # A prefill's last token would be a source, but nobody tells of one token.
        self._used[layer] = keys - first if decode else _NOBODY
        self._rows[layer] = self._rows_of(layer)
        predict(
            self._features[first:end], inputs, weights, links, self._rows[layer], probabilities, self._later[first:end],
            need, decode, self._rates,
        )  # fmt: skip
        self._value(first, end, probabilities)
        layers = self.geometry.layers
        start = layers - 1 - layer
        self.layer_scale[:] = self._scales[start : start + layers]

    def _rows_of(self, layer: int) -> Ints:
        """Rows of the layer's links: the experts that this pass used in its sources."""
        counts, place, rows = self.geometry.counts, 0, []
        for source in self._sources[layer]:
            rows.append(self._used[source] + place)
            place += counts[source]
        return np.concatenate(rows)

    def on_forecast(self, first_key: int, probabilities: Scores) -> None:
        """Counts until the layer is routed."""
        self._value(first_key, first_key + len(probabilities), probabilities)
        self.refresh_layer(self._layer_of[first_key])

    # --- kept between runs -----------------------------------------------------------------------------------

    def _tables(self) -> dict[str, npt.NDArray[np.floating]]:
        tables: dict[str, npt.NDArray[np.floating]] = {"weights": self.weights}
        return tables | {f"links {layer}": links for layer, links in enumerate(self.links)}

    def state(self) -> dict[str, npt.NDArray[np.floating]]:
        """What was learnt, by name; what was used last is not in it."""
        return {name: table.copy() for name, table in self._tables().items()}

    def restore(self, state: Mapping[str, npt.NDArray[np.floating]]) -> None:
        """Take over what `state` gave of a model of the same geometry.

        Raises:
            ValueError: it is of another model, or damaged; nothing was taken over.
        """
        tables = self._tables()
        check_tables(tables, state)
        for name, table in tables.items():
            table[:] = state[name]
