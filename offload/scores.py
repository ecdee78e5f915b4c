"""Routers' scores on their way to the cache policies that want them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from prefetch.policies.base import CachePolicy

Floats = npt.NDArray[np.float32]


class RouterScores:
    """Keeps what a layer's router said until the layer's step is done, and tells policies then."""

    def __init__(self, policies: Sequence[CachePolicy], first_keys: Sequence[int]) -> None:
        """Know nothing yet.

        Args:
            policies: those that are to be told; see `CachePolicy.on_scores`.
            first_keys: of each layer, the key of its expert 0.
        """
        self._policies = tuple(policies)
        self._first_keys = tuple(first_keys)
        # A router and the step that follows it run on one thread; another thread's may come between.
        self._thread = threading.local()

    def note(self, layer: int, scores: Floats) -> None:
        """A router ran.

        Args:
            layer: its layer.
            scores: float32 [experts], each expert's mean probability over the tokens of the step to come.
        """
        self._thread.said = layer, scores

    def tell(self, layer: int) -> None:
        """The layer's step is done; policies were told of its routing. Call with the runtime's lock."""
        said, self._thread.said = getattr(self._thread, "said", None), None
        if said is not None and said[0] == layer:
            for policy in self._policies:
                policy.on_scores(self._first_keys[layer], said[1])
