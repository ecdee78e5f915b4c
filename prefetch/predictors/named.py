"""Names of predictors."""

from __future__ import annotations

from prefetch.predictors.base import LayerPredictor
from prefetch.predictors.predictor import Predictor


def name_of(predictor: LayerPredictor) -> str:
    """The source of this package's, "auto" for all of them; of a user's own its class."""
    if type(predictor) is Predictor:
        return predictor.source
    return type(predictor).__name__
