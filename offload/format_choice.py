"""`quant="auto"`: formats by predicted speed, with the errors that a user is to see."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from offload.errors import DoesNotFitError, InvalidArgumentError
from placement.format_choice import NotPredictedError, choose_format
from placement.model_spec import ModelSpec
from placement.plan import Plan


def fastest_format(specs: Sequence[ModelSpec], make: Callable[[ModelSpec], Plan]) -> tuple[int, Plan]:
    """(index of the best, its plan); see `placement.format_choice.choose_format`. Of one there is nothing to choose.

    Args:
        specs: the model in each of the formats.
        make: its plan; raises DoesNotFitError.

    Raises:
        DoesNotFitError: it fits in no format; that of the last.
        InvalidArgumentError: nothing is predicted of one.
    """
    if len(specs) == 1:
        return 0, make(specs[0])
    try:
        return choose_format(specs, make, DoesNotFitError)
    except NotPredictedError as error:
        raise InvalidArgumentError(
            f'quant="auto": formats are chosen by predicted speed, and {error}. Fix: run `offload profile` (not '
            "--quick) on this machine, or name a format; of an accelerator that host memory plays nothing is predicted"
        ) from error
