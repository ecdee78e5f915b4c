"""What is learnt while a model decodes: how far routers of later layers may be believed, and what follows what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prefetch.learning import check_tables
from prefetch.policies.geometry import Geometry
from prefetch.predictors import combine_kernel as kernel

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_START_WEIGHTS = (0.0, 1.5, 0.2, 0.1, 0.2)
"""Of bias, router, transition, previous token and popularity: the router of the layer itself is what is worth most."""

DEPTH = 3
"""Layers ahead that are predicted unless told otherwise."""

SCORED = 8
"""One token in so many is scored: sorting is most of what a prediction costs."""

_RATE = 0.05
_OFFSET_RATE = 0.05
_DECAY = 0.95


@dataclass(frozen=True)
class Skill:
    """How often predictors were right of one layer.

    Recall among the k most probable, with k the experts that were needed, is also precision at k; recall at 2 k is
    twice the precision there. One token in `SCORED` is counted.

    Attributes:
        layer: that was predicted.
        ahead: from how many layers before.
        router: the layer's own router on the earlier hidden state.
        transition: what followed the earlier layer's experts before.
        previous: what the token before needed, then what is popular.
        combined: all of them.
        combined_2k: recall of all of them among the 2 k most probable.
    """

    layer: int
    ahead: int
    router: float
    transition: float
    previous: float
    combined: float
    combined_2k: float


@dataclass
class _Pending:
    """A prediction whose layer has not come yet."""

    logits: Floats
    inputs: Floats
    probabilities: Floats
    made: bool = False


def _pending(count: int) -> _Pending:
    return _Pending(np.zeros(count), np.zeros((count, kernel.INPUTS)), np.zeros(count))


class Predictor:
    """Predicts layers 1 to `depth` ahead, while one sequence is decoded; learns from what comes.

    Calls for a token: for each layer in order `predict`, for as many layers ahead as wanted, then `observe`.

    The router's logits are corrected by their mean error so far. For a linear router that is its product with the mean
    residual between the two layers' hidden states, which is DALI's correction (arXiv 2602.03495), learnt online.
    """

    def __init__(self, geometry: Geometry, depth: int = DEPTH) -> None:
        if depth < 1:
            raise ValueError(f"depth={depth}: expected at least one layer ahead")
        self.geometry = geometry
        self.depth = depth
        layers = geometry.layers
        self.weights: Floats = np.tile(np.array(_START_WEIGHTS), (layers, depth, 1))
        self.counts: Floats = np.zeros((layers, depth, kernel.ROWS + 1))
        self._transitions = {
            (layer, ahead): np.full((geometry.counts[layer], geometry.counts[layer + ahead]), 0.1, np.float32)
            for layer in range(layers)
            for ahead in range(1, depth + 1)
            if layer + ahead < layers
        }
        self._observed = [0] * layers
        self._previous = [np.zeros(count) for count in geometry.counts]
        self._popular = [np.full(count, 0.1) for count in geometry.counts]
        self._active: list[Ints] = [np.zeros(0, np.int64) for _ in geometry.counts]
        ahead_of = [(layer, ahead) for layer in range(layers) for ahead in range(1, depth + 1)]
        self._offsets = {(layer, ahead): np.zeros(geometry.counts[layer]) for layer, ahead in ahead_of}
        self._pending = {(layer, ahead): _pending(geometry.counts[layer]) for layer, ahead in ahead_of}

    def predict(self, layer: int, ahead: int, logits: npt.NDArray[np.floating], active: Ints, top_k: int) -> Floats:
        """How probably each expert of layer `layer + ahead` will be needed.

        Args:
            layer: the layer that the token is at.
            ahead: 1 to `depth`; the layer that is meant exists.
            logits: [experts of the layer that is meant], what its router says of this layer's hidden state.
            active: int64, experts of this layer that the token goes to; empty where that is not known yet.
            top_k: experts of a token in the layer that is meant.

        Returns:
            float64 [experts]; valid until the layer is predicted from the same distance again.
        """
        target = layer + ahead
        pending = self._pending[target, ahead]
        pending.logits[:] = logits
        kernel.predict(
            pending.logits + self._offsets[target, ahead], self._transitions[layer, ahead], active,
            self._previous[target], self._popular[target], min(top_k, self.geometry.counts[target]),
            self.weights[target, ahead - 1], pending.inputs, pending.probabilities,
        )  # fmt: skip
        pending.made = True
        return pending.probabilities

    def observe(self, layer: int, experts: Ints, logits: npt.NDArray[np.floating] | None = None) -> None:
        """The layer came.

        Args:
            layer: the layer.
            experts: int64, what it needed for one decoded token.
            logits: [experts of the layer], what its router said; None where that is not known.
        """
        used = np.zeros(self.geometry.counts[layer])
        used[experts] = 1.0
        for ahead in range(1, self.depth + 1):
            pending = self._pending[layer, ahead]
            if pending.made:
                pending.made = False
                if logits is not None:
                    self._offsets[layer, ahead] *= 1.0 - _OFFSET_RATE
                    self._offsets[layer, ahead] += _OFFSET_RATE * (logits - pending.logits)
                kernel.learn(pending.inputs, pending.probabilities, used, _RATE, self.weights[layer, ahead - 1])
                if self._observed[layer] % SCORED == 0:
                    kernel.score(pending.inputs, pending.probabilities, used, self.counts[layer, ahead - 1])
            if layer >= ahead:
                kernel.note_transition(
                    self._transitions[layer - ahead, ahead], self._active[layer - ahead], used, _DECAY
                )
        self._observed[layer] += 1
        self._active[layer] = experts
        self._previous[layer] = used
        popular = self._popular[layer]
        popular *= _DECAY
        popular += (1.0 - _DECAY) * used

    def skills(self) -> list[Skill]:
        """Of every layer that was predicted, from each distance."""
        found = []
        for layer in range(self.geometry.layers):
            for ahead in range(1, self.depth + 1):
                counts = self.counts[layer, ahead - 1]
                if counts[kernel.ROWS]:
                    found.append(Skill(layer, ahead, *(counts[: kernel.ROWS] / counts[kernel.ROWS]).tolist()))
        return found

    # --- kept between runs -----------------------------------------------------------------------------------

    def _arrays(self) -> dict[str, npt.NDArray[np.floating]]:
        arrays: dict[str, npt.NDArray[np.floating]] = {"weights": self.weights}
        arrays |= {f"transitions {layer} {ahead}": table for (layer, ahead), table in self._transitions.items()}
        arrays |= {f"offset {layer} {ahead}": offset for (layer, ahead), offset in self._offsets.items()}
        arrays |= {f"popular {layer}": shares for layer, shares in enumerate(self._popular)}
        return arrays

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
