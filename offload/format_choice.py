"""`quant="auto"`: formats by predicted speed, with the errors that a user is to see."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from offload.errors import DoesNotFitError, InvalidArgumentError
from placement.format_choice import NotPredictedError, choose_format, plan_prediction
from placement.model_spec import ModelSpec
from placement.plan import Plan
from placement.prediction import Prediction


def fastest_format(
    specs: Sequence[ModelSpec],
    make: Callable[[ModelSpec], Plan],
    judge: Callable[[ModelSpec, Plan], Prediction | None] = plan_prediction,
) -> tuple[int, Plan]:
    """(index of the best, its plan); see `placement.format_choice.choose_format`. Of one there is nothing to choose.

    Args:
        specs: the model in each of the formats.
        make: its plan; raises DoesNotFitError.
        judge: what is predicted of a plan.

    Raises:
        DoesNotFitError: it fits in no format; that of the last.
        InvalidArgumentError: nothing is predicted of one.
    """
    if len(specs) == 1:
        return 0, make(specs[0])
    try:
        return choose_format(specs, make, DoesNotFitError, judge)
    except NotPredictedError as error:
        raise InvalidArgumentError(
            f'quant="auto": formats are chosen by predicted speed, and {error}. Fix: run `offload profile` (not '
            "--quick) on this machine, or name a format; of an accelerator that host memory plays nothing is predicted"
        ) from error
