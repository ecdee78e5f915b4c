"""The default policy: keep what is most probably needed again, and soonest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels.compiling.compiler import direct
from prefetch.learning import check_tables
from prefetch.policies import forecast_kernel as kernel
from prefetch.policies.base import Scores
from prefetch.policies.forecast_kernel import PATIENCE_PASSES
from prefetch.policies.geometry import Geometry
from prefetch.policies.links import sources_of
from prefetch.policies.valued import Floats, Ints, ValuedPolicy

_START_WEIGHTS = (0.5, 0.3, 0.1, 0.3, -0.3, 0.2)
"""Of long, middle and short shares, last use, visits since and bias: near what traces of a trained model teach."""

_RATES = (0.99, 0.9, 0.6, 0.05, 0.07, 1.0)
"""In the order of the kernel's."""

_UNSEEN_VISITS = 20.0

_START_PROBABILITY = 0.1


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
        layers, counts = geometry.layers, geometry.counts
        self.weights: Floats = np.tile(np.array(_START_WEIGHTS), (layers, 1))
        blocks = [-(-count // kernel.LANES) for count in counts]
        known = np.zeros((sum(blocks), kernel.ROWS, kernel.LANES), np.float32)
        known[:, kernel.SINCE] = _UNSEEN_VISITS
        known[:, kernel.PROBABILITY] = _START_PROBABILITY
        self._known = known.reshape(-1)
        ends = np.cumsum(blocks).tolist()
        self._probabilities = [
            known[end - size : end, kernel.PROBABILITY] for size, end in zip(blocks, ends, strict=True)
        ]
        self._spare = np.zeros(kernel.SPARE_LINES * kernel.LANES * max(blocks), np.float32)
        self._layers = np.zeros((layers, kernel.COLUMNS + 4 * max(counts)), np.int64)
        shapes: list[tuple[int, int]] = []
        for layer, own in enumerate(self._layers):
            sources = sources_of(counts, layer)
            own[kernel.LINKS] = sum(rows * columns for rows, columns in shapes)
            own[kernel.SOURCES] = len(sources)
            own[kernel.SOURCE : kernel.SOURCE + len(sources)] = sources
            own[kernel.FIRST_BLOCK] = sum(blocks[:layer])
            shapes.append((sum(counts[source] for source in sources), counts[layer]))
        self._links = np.zeros(sum(rows * columns for rows, columns in shapes), np.float32)
        starts = self._layers[:, kernel.LINKS].tolist()
        self.links = [
            self._links[start : start + shape[0] * shape[1]].reshape(shape)
            for start, shape in zip(starts, shapes, strict=True)
        ]
        self._rates = np.array(_RATES)
        passes = (np.arange(layers) + 1) / layers
        # A layer's scale is its place in this, counted from the layer that was visited last.
        self._scales = np.tile(1.0 / (passes + PATIENCE_PASSES), 2)
        self.layer_scale[:] = self._scales[:layers]
        self._visit_layer, self._value_foretold = direct(kernel.visit_layer), direct(kernel.value_foretold)
        for layer, (first, end) in enumerate(self._ranges):
            self._believe(layer, np.full(end - first, _START_PROBABILITY))

    def expected(self, first_key: int) -> npt.NDArray[np.float32]:
        """float32 [experts of the layer], what the regression says."""
        layer = self._layer_of[first_key]
        found: npt.NDArray[np.float32] = self._probabilities[layer].reshape(-1)
        return found[: self.geometry.counts[layer]]

    @property
    def tables(self) -> tuple[Any, ...]:
        """For `foresight_kernel`, in its order: views, of which it updates what `on_forecast` and `victims` do."""
        return (
            self._table, self._per_layer, self._first_keys, self._quotas, self._known, self._layers, self._rates,
        )  # fmt: skip

    def _believe(self, layer: int, probabilities: Floats) -> None:
        """The layer's next visit needs its experts with these probabilities."""
        self._value_foretold(
            layer, probabilities, self._table, self._first_keys, self._known, self._layers, self._rates
        )

    def _observe(self, visit: Ints, shares: Floats) -> None:
        self._visit_layer(
            visit, shares, self._table, self._per_layer, self._first_keys, self._known, self.weights, self._links,
            self._layers, self._scales, self._rates, self._spare,
        )  # fmt: skip

    def on_forecast(self, first_key: int, probabilities: Scores) -> None:
        """Counts until the layer is routed."""
        layer = self._layer_of[first_key]
        self._believe(layer, np.ascontiguousarray(probabilities, np.float64))
        self.refresh_layer(layer)

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
