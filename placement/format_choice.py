"""Formats that the user left open: the most precise of those that are about as fast as the fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from placement.model_spec import ModelSpec
from placement.plan import FormatOption, Plan
from placement.prediction import Prediction

_WITHIN = 1.06
"""Predictions are right to within so much: what is predicted to take that much longer than the fastest is as good, and
more precise."""


class NotPredictedError(ValueError):
    """There is nothing to choose formats by."""


def choose_format(
    specs: Sequence[ModelSpec], make: Callable[[ModelSpec], Plan], infeasible: type[Exception]
) -> tuple[int, Plan]:
    """Plan a model in each of several formats, and take the one that is best for the plans' workload.

    Args:
        specs: the model in each format, the most precise first.
        make: its plan.
        infeasible: what `make` raises where it does not fit.

    Returns:
        (index of the one that is taken, its plan, whose `format_options` says what was weighed).

    Raises:
        infeasible: none fits; that of the last.
        NotPredictedError: something that fits has no prediction.
    """
    found: dict[int, tuple[Plan, Prediction]] = {}
    refusal: Exception | None = None
    for index, spec in enumerate(specs):
        try:
            plan = make(spec)
        except infeasible as error:
            refusal = error
            continue
        if plan.prediction is None:
            raise NotPredictedError(f"nothing is predicted for {spec.name} in {_option(spec, None).in_words}")
        found[index] = (plan, plan.prediction)
    if not found:
        assert refusal is not None, "no format to choose from"
        raise refusal
    seconds = {index: told.request_s(plan.workload.new_tokens) for index, (plan, told) in found.items()}
    least = min(seconds.values())
    best = next(index for index, request_s in seconds.items() if request_s <= _WITHIN * least)
    options = tuple(_option(spec, found[index][1] if index in found else None) for index, spec in enumerate(specs))
    return best, replace(found[best][0], format_options=options)


def _option(spec: ModelSpec, prediction: Prediction | None) -> FormatOption:
    experts = next((layer.layout.format for layer in spec.experts), spec.dense_format)
    if prediction is None:
        return FormatOption(experts, spec.dense_format, spec.head_format)
    decode, prefill = prediction.decode.tokens_per_s, prediction.prefill.tokens_per_s
    return FormatOption(experts, spec.dense_format, spec.head_format, decode, prefill)
