"""The interface that every cache policy has.

An expert is an integer key (see `placement.model_spec.ModelSpec`: experts numbered through all layers). A policy
knows keys, never slots or bytes; it is told what happens and asked for victims. Calls come from one thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating]


class CachePolicy(ABC):
    """Decides what leaves a tier. Invariant: the resident keys are those inserted and not yet evicted.

    Attributes:
        wants_scores: whether it is to be told of routers' scores (`on_scores`), which takes time in every step.
    """

    wants_scores: bool = False

    @abstractmethod
    def on_route(self, keys: Sequence[int], shares: Sequence[float] | None = None) -> None:
        """A layer was routed: `keys` are the experts that it needs in this step, resident or not, each once.

        Args:
            keys: experts of one layer.
            shares: at prefill, the share of the step's tokens that goes to each, 0 to 1: how much a step stands for
                what one decoded token would need. None at decode: each is needed, whoever's token it is.
        """

    @abstractmethod
    def on_insert(self, key: int) -> None:
        """`key` was given a slot."""

    @abstractmethod
    def on_evict(self, key: int) -> None:
        """`key` lost its slot."""

    @abstractmethod
    def victim(self, pinned: Collection[int]) -> int | None:
        """The resident key to evict next, or None when all resident keys are in `pinned`.

        Does not evict: `on_evict` follows if the caller does.
        """

    def victims(self, pinned: Collection[int], count: int) -> list[int]:
        """Up to `count` resident keys that are not pinned, each once, the first to evict first; evicts none.

        What evicting them one by one with `victim` would give, as far as nothing else happens in between.
        """
        held = set(pinned)
        found: list[int] = []
        while len(found) < count and (key := self.victim(held)) is not None:
            held.add(key)
            found.append(key)
        return found

    def worth(self, key: int) -> float | None:
        """What having `key` gains, resident or not, on a scale of the policy's own; None where it has none."""
        return None

    def expected(self, first_key: int) -> Scores | None:
        """What the policy expects of a layer's next visit by itself, whatever `on_forecast` said.

        Args:
            first_key: key of the layer's expert 0.

        Returns:
            float [experts of the layer], how probably each will be needed, valid until the layer is routed; None where
            the policy expects nothing.
        """
        return None

    def on_scores(self, first_key: int, scores: Scores) -> None:  # noqa: B027 - most policies need none
        """The router's scores of the step that `on_route` told of, before it picked; told when the step is done.

        Args:
            first_key: key of the layer's expert 0.
            scores: float [experts of the layer], each expert's mean probability over the step's tokens.
        """

    def on_forecast(self, first_key: int, probabilities: Scores) -> None:  # noqa: B027 - most policies use none
        """A predictor's word on a layer that is still to come in this pass; holds until the layer is routed.

        Args:
            first_key: key of the layer's expert 0.
            probabilities: float [experts of the layer], how probably each will be needed.
        """

    def on_resize(self, slots: int) -> None:  # noqa: B027 - most policies do not care
        """The tier has `slots` slots from now on; told before the first insert and at every change."""
