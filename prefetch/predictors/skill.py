"""How often predictors were right."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Skill:
    """How often predictors were right of one layer.

    Recall among the k most probable, with k the experts that were needed, is also precision at k; recall at 2 k is
    twice the precision there. One token in so many is counted. What is no source of a predictor has recall 0.

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
