"""What a predictor of a user's own says is checked before anything goes by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from offload.errors import PartError
from offload.foreseen import checked
from prefetch.policies.geometry import Geometry
from prefetch.predictors.base import LayerPredictor
from prefetch.predictors.predictor import Predictor

GEOMETRY = Geometry((4, 3, 5))


class Own(LayerPredictor):
    def predict_next(self, *_: Any) -> Any:
        raise NotImplementedError

    def observe(self, *_: Any) -> None:
        raise NotImplementedError


def test_probabilities_pass() -> None:
    said: Any = [np.array([0.0, 0.5, 1.0], np.float32), [0.1] * 5]
    found = checked(Own(GEOMETRY), 0, said, GEOMETRY.counts[1:])
    assert [one.dtype for one in found] == [np.float64] * 2
    assert all(np.array_equal(one, np.asarray(other, np.float64)) for one, other in zip(found, said, strict=True))
    ours = [np.ones(3)]
    assert checked(Predictor(GEOMETRY), 0, ours, (3,))[0] is ours[0]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([], "spoke of 0 layers, expected 2, at MoE layer 0"),
        ([np.ones(3)], "spoke of 1 layers"),
        ([np.ones(3), np.ones(4)], r"gave an array of shape \(4,\), expected \(5,\), at MoE layer 2"),
        ([np.ones((1, 3)), np.ones(5)], r"shape \(1, 3\), expected \(3,\), at MoE layer 1"),
        ([np.ones(3), np.array([0, 0, 0, 0, 1.1])], "numbers from 0.0 to 1.1, expected 0 to 1"),
        ([-np.ones(3), np.ones(5)], "numbers from -1.0 to -1.0"),
        ([np.array([0.1, np.nan, 0.2]), np.ones(5)], "numbers from nan to nan"),
    ],
)
def test_others_are_refused(said: Any, message: str) -> None:
    with pytest.raises(PartError, match=f"^Own.predict_next .*{message}"):
        checked(Own(GEOMETRY), 0, said, GEOMETRY.counts[1:])


def test_what_an_interface_gives_for_nothing() -> None:
    own = Own(GEOMETRY)
    assert (own.geometry, own.depth, own.skills(), own.state()) == (GEOMETRY, 3, [], {})
    own.restore({})
    with pytest.raises(ValueError, match="another model"):
        own.restore({"weights": np.ones(3)})
    with pytest.raises(ValueError, match="depth=0"):
        Own(GEOMETRY, 0)
