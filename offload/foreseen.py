"""What a predictor says, checked where it is used: it may be a user's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from offload.errors import PartError
from prefetch.predictors.base import LayerPredictor
from prefetch.predictors.predictor import Predictor

Floats = npt.NDArray[np.float64]


def checked(predictor: LayerPredictor, layer: int, said: Sequence[Floats], counts: Sequence[int]) -> list[Floats]:
    """What `LayerPredictor.predict_next` said of the layers after `layer`, of so many experts.

    Raises:
        PartError: it is no probability for each expert of each of them.
    """
    if type(predictor) is Predictor:
        return list(said)
    if len(said) != len(counts):
        raise _refused(predictor, layer, f"spoke of {len(said)} layers, expected {len(counts)}")
    found = [np.ascontiguousarray(one, np.float64) for one in said]
    for ahead, (one, count) in enumerate(zip(found, counts, strict=True), start=1):
        if one.shape != (count,):
            raise _refused(predictor, layer + ahead, f"gave an array of shape {one.shape}, expected ({count},)")
        # Of a NaN neither holds.
        if not (one.min() >= 0 and one.max() <= 1):
            raise _refused(predictor, layer + ahead, f"gave numbers from {one.min()} to {one.max()}, expected 0 to 1")
    return found


def _refused(predictor: LayerPredictor, layer: int, found: str) -> PartError:
    return PartError(f"{type(predictor).__name__}.predict_next {found}, at MoE layer {layer}")
