"""What is learnt while a model decodes: how far routers of later layers may be believed, and what follows what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels.compiling.compiler import direct
from prefetch.learning import check_tables
from prefetch.policies.geometry import Geometry
from prefetch.predictors import combine_kernel as kernel
from prefetch.predictors.base import DEPTH, Floats, Ints, LayerPredictor
from prefetch.predictors.names import SOURCES
from prefetch.predictors.skill import Skill

_START_WEIGHTS = ((0.0, 4.5, 0.5, 0.3, 0.0, 0.3), (0.0, 3.0, 0.7, 0.4, 0.0, 0.3), (0.0, 2.0, 0.8, 0.5, 0.0, 0.3))
"""Of bias, router, transition, previous token, popularity and what the policy expects, by layers ahead (the last for
all further): the layer's own router is worth most, and less from further away."""

_START_CURVATURE = 3.0
"""How much the start's weights count beside what comes: as much as a few tokens."""

SCORED = 8
"""One token in so many is scored: sorting is most of what a prediction costs."""

_CURVATURE_DECAY = 0.995
_OFFSET_RATE = 0.05
_DECAY = 0.95

_UNKNOWN: Floats = np.zeros(0)

_UNTOLD = 0.5
"""Log-odds 0, with which nothing moves."""


_INPUT_OF = dict(zip(SOURCES, (kernel.ROUTER, kernel.TRANSITION, kernel.PREVIOUS, kernel.POPULAR), strict=True))
_INPUT_OF_ROW = {
    kernel.BY_ROUTER: kernel.ROUTER, kernel.BY_TRANSITION: kernel.TRANSITION, kernel.BY_PREVIOUS: kernel.PREVIOUS,
}  # fmt: skip


class Predictor(LayerPredictor):
    """Predicts layers 1 to `depth` ahead, while one sequence is decoded; learns from what comes.

    Calls for a token: for each layer in order `predict`, for as many layers ahead as wanted, then `observe`.

    The router's logits are corrected by their mean error so far. For a linear router that is its product with the mean
    residual between the two layers' hidden states, which is DALI's correction (arXiv 2602.03495), learnt online.
    """

    def __init__(self, geometry: Geometry, depth: int = DEPTH, source: str = "auto") -> None:
        """Know nothing yet.

        Args:
            geometry: the experts.
            depth: layers ahead that can be predicted.
            source: one of SOURCES to go by alone; "auto" for all of them and what the cache policy expects.

        Raises:
            ValueError: there is no such source, or a depth below 1.
        """
        super().__init__(geometry, depth)
        if source not in ("auto", *SOURCES):
            raise ValueError(f"source={source!r}: expected auto, {', '.join(SOURCES)}")
        self.source = source
        self._sources: Floats = np.ones(kernel.INPUTS)
        if source != "auto":
            self._sources[kernel.BIAS + 1 :] = 0.0
            self._sources[_INPUT_OF[source]] = 1.0
        layers = geometry.layers
        counts, rows, most = geometry.counts, layers * depth, max(geometry.counts)
        starts = [_START_WEIGHTS[min(ahead, len(_START_WEIGHTS) - 1)] for ahead in range(depth)]
        self.weights: Floats = np.tile(np.array(starts), (layers, 1, 1))
        self.curvature: Floats = np.tile(_START_CURVATURE * np.eye(kernel.INPUTS), (rows, 1, 1))
        self.counts: Floats = np.zeros((layers, depth, kernel.ROWS + 1))
        # Rows are a layer and the distance from which it is predicted.
        sizes = [
            (counts[layer - ahead] if layer >= ahead else 0) * counts[layer]
            for layer in range(layers)
            for ahead in range(1, depth + 1)
        ]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)[:-1]
        self._transitions = np.full(sum(sizes), 0.1, np.float32)
        self._offsets = np.zeros((rows, most))
        self._inputs = np.zeros((rows, most, kernel.INPUTS))
        self._said = np.zeros((rows, most))
        self._probabilities = np.zeros((rows, most))
        self._made = np.zeros(rows, np.int64)
        self._uses = np.concatenate([np.zeros((layers, most)), np.full((layers, most), 0.1)])
        self._active = np.zeros((layers, most), np.int64)
        self._used = np.zeros(layers, np.int64)
        self._observed = [0] * layers
        self._counts = np.array(counts, np.int64)
        self._top_k = np.zeros(layers, np.int64)
        self._heard = np.zeros((depth, most))
        self._expected = np.full((depth, most), _UNTOLD)
        self._rates = np.array([_CURVATURE_DECAY, _OFFSET_RATE, _DECAY])
        self._flat_weights, self._flat_counts = self.weights.reshape(rows, -1), self.counts.reshape(rows, -1)
        self._predict, self._observe = direct(kernel.predict), direct(kernel.observe)
        self._views = [self._probabilities[row, : counts[row // depth]] for row in range(rows)]

    def predict(
        self,
        layer: int,
        ahead: int,
        logits: npt.NDArray[np.floating],
        active: Ints,
        top_k: int,
        expected: npt.NDArray[np.floating] | None = None,
    ) -> Floats:
        """How probably each expert of layer `layer + ahead` will be needed; see `predict_next`."""
        (found,) = self._predict_from(layer, ahead, [logits], active, [top_k], [expected])
        return found

    def predict_next(
        self,
        layer: int,
        logits: Sequence[npt.NDArray[np.floating]],
        active: Ints,
        top_k: Sequence[int],
        expected: Sequence[npt.NDArray[np.floating] | None],
    ) -> list[Floats]:
        """See `LayerPredictor`."""
        return self._predict_from(layer, 1, logits, active, top_k, expected)

    def _predict_from(
        self,
        layer: int,
        first: int,
        logits: Sequence[npt.NDArray[np.floating]],
        active: Ints,
        top_k: Sequence[int],
        expected: Sequence[npt.NDArray[np.floating] | None],
    ) -> list[Floats]:
        counts, depth, target = self.geometry.counts, self.depth, layer + first
        for place, (said, k, known) in enumerate(zip(logits, top_k, expected, strict=True)):
            count = counts[target + place]
            self._heard[place, :count] = said
            self._expected[place, :count] = _UNTOLD if known is None else known
            self._top_k[target + place] = min(k, count)
        self._predict(
            layer, first, first + len(logits), self._counts, self._top_k, self._heard, self._expected, active,
            self._starts, self._uses, self._flat_weights, self._offsets, self._inputs, self._said, self._probabilities,
            self._transitions, self._made, self._sources,
        )  # fmt: skip
        return [self._views[(target + place) * depth + first + place - 1] for place in range(len(logits))]

    def tables(self, top_k: Sequence[int]) -> tuple[Any, ...]:
        """For `foresight_kernel`, in its order: views of what `predict_next` reads and fills.

        Args:
            top_k: experts of a token, of each layer; in place of those that `predict_next` is told.
        """
        self._top_k[:] = np.minimum(top_k, self._counts)
        return (
            self._counts, self._top_k, self._heard, self._expected, self._starts, self._uses, self._flat_weights,
            self._offsets, self._inputs, self._said, self._probabilities, self._transitions, self._made, self._sources,
        )  # fmt: skip

    def observe(self, layer: int, experts: Ints, logits: npt.NDArray[np.floating] | None = None) -> None:
        """Learn from it; see `LayerPredictor`."""
        scored = self._observed[layer] % SCORED == 0
        self._observed[layer] += 1
        self._observe(
            layer, self.geometry.counts[layer], scored, experts,
            _UNKNOWN if logits is None else np.ascontiguousarray(logits, np.float64), self._starts, self._uses,
            self._flat_weights, self.curvature, self._offsets, self._inputs, self._said, self._probabilities,
            self._transitions, self._made, self._active, self._flat_counts, self._used, self._rates,
        )  # fmt: skip

    def skills(self) -> list[Skill]:
        """Of every layer that was predicted, from each distance; one token in `SCORED` is counted."""
        found = []
        known = np.ones(kernel.ROWS)
        for row, place in _INPUT_OF_ROW.items():
            known[row] = self._sources[place]
        for layer in range(self.geometry.layers):
            for ahead in range(1, self.depth + 1):
                counts = self.counts[layer, ahead - 1]
                if counts[kernel.ROWS]:
                    found.append(Skill(layer, ahead, *(known * counts[: kernel.ROWS] / counts[kernel.ROWS]).tolist()))
        return found

    # --- kept between runs -----------------------------------------------------------------------------------

    def _arrays(self) -> dict[str, npt.NDArray[np.floating]]:
        arrays: dict[str, npt.NDArray[np.floating]] = {"weights": self.weights, "curvature": self.curvature}
        counts, layers = self.geometry.counts, self.geometry.layers
        rows = [(layer, ahead, layer * self.depth + ahead - 1) for layer in range(layers) for ahead in self._distances]
        for layer, ahead, row in rows:
            if layer >= ahead:
                shape = (counts[layer - ahead], counts[layer])
                start = int(self._starts[row])
                table = self._transitions[start : start + shape[0] * shape[1]].reshape(shape)
                arrays[f"transitions {layer - ahead} {ahead}"] = table
        arrays |= {f"offset {layer} {ahead}": self._offsets[row, : counts[layer]] for layer, ahead, row in rows}
        arrays |= {f"popular {layer}": self._uses[layers + layer, : counts[layer]] for layer in range(layers)}
        return arrays

    @property
    def _distances(self) -> range:
        return range(1, self.depth + 1)

    def state(self) -> dict[str, npt.NDArray[np.float32]]:
        """What was learnt, by name; what happens to be pending is not in it."""
        return {name: array.astype(np.float32) for name, array in self._arrays().items()}

    def restore(self, state: Mapping[str, npt.NDArray[np.floating]]) -> None:
        """Take over what `state` gave of a model of the same geometry and depth.

        Raises:
            ValueError: it is of another model, or damaged; nothing was taken over.
        """
        expected = self._arrays()
        check_tables(expected, state)
        for name, array in expected.items():
            array[:] = state[name]
