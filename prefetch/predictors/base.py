"""The interface that every predictor of layers to come has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from prefetch.learning import check_tables
from prefetch.policies.geometry import Geometry
from prefetch.predictors.skill import Skill

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DEPTH = 3
"""Layers ahead that are predicted unless told otherwise."""


class LayerPredictor(ABC):
    """Says which experts the next layers will need, while one sequence is decoded. Wrong words cost reads, no results.

    Calls come from one thread at a time; for a token, for each layer in order `predict_next`, then `observe`. Either
    may be left out: where reading ahead rests, or a pass ends early.

    Attributes:
        geometry: the experts.
        depth: layers ahead that can be predicted, at least 1.
    """

    def __init__(self, geometry: Geometry, depth: int = DEPTH) -> None:
        if depth < 1:
            raise ValueError(f"depth={depth}: expected at least one layer ahead")
        self.geometry = geometry
        self.depth = depth

    @abstractmethod
    def predict_next(
        self,
        layer: int,
        logits: Sequence[npt.NDArray[np.floating]],
        active: Ints,
        top_k: Sequence[int],
        expected: Sequence[npt.NDArray[np.floating] | None],
    ) -> list[Floats]:
        """How probably each expert of the next layers will be needed.

        Args:
            layer: the layer that the token is at.
            logits: for each of the next layers, at most `depth`, [experts], what its router says of this layer's hidden
                state.
            active: int64, experts of this layer that the token goes to; empty where that is not known yet.
            top_k: for each of the next layers, experts of a token there.
            expected: for each of the next layers, [experts], how probably it needs each as the cache policy has it
                (`CachePolicy.expected`), or None.

        Returns:
            For each, float64 [experts], 0 to 1; valid until the layer is predicted from the same distance again.
        """

    @abstractmethod
    def observe(self, layer: int, experts: Ints, logits: npt.NDArray[np.floating] | None = None) -> None:
        """The layer came.

        Args:
            layer: the layer.
            experts: int64, what it needed for one decoded token.
            logits: [experts of the layer], what its router said; None where that is not known.
        """

    def skills(self) -> list[Skill]:
        """Of every layer that was predicted, from each distance; empty where nothing is counted."""
        return []

    def state(self) -> Mapping[str, npt.NDArray[np.floating]]:
        """What is kept from one run to the next, by name; kept in float32."""
        return {}

    def restore(self, state: Mapping[str, npt.NDArray[np.floating]]) -> None:
        """Go on from what `state` gave in an earlier run.

        Raises:
            ValueError: it is of another model, or damaged; nothing was taken over.
        """
        check_tables(self.state(), state)
