"""Formats that are left open: fastest within the budget, and no less precise than that takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement.format_choice import NotPredictedError, choose_format
from placement.hardware_profile import HardwareProfile
from placement.model_spec import ModelSpec
from placement.plan import Plan
from placement.planner import PlanInfeasibleError, make_plan
from placement.prediction import PassPrediction
from placement.workload import Workload
from tests.placement.machines import machine, model

CPU = machine(gpu=False)
WORK = Workload(512, prompt_tokens=16, new_tokens=64)
SPECS = [model(layers=4, experts=16, top_k=4, format=format) for format in ("bf16", "int4")]


def least(spec: ModelSpec) -> int:
    return make_plan(spec, WORK, 1 << 40).minimum_ram_nbytes


def choose(budget: int, profile: HardwareProfile | None = CPU, specs: list[ModelSpec] = SPECS) -> tuple[int, Plan]:
    return choose_format(specs, lambda spec: make_plan(spec, WORK, budget, profile), PlanInfeasibleError)


def test_the_fastest_is_taken_and_what_was_weighed_is_told() -> None:
    best, plan = choose(1 << 30)
    assert (best, plan.format) == (1, "int4")
    assert replace(plan, format_options=()) == make_plan(SPECS[1], WORK, 1 << 30, CPU)
    assert [option.experts for option in plan.format_options] == ["bf16", "int4"]
    for option, spec in zip(plan.format_options, SPECS, strict=True):
        told = make_plan(spec, WORK, 1 << 30, CPU).prediction
        assert told is not None
        assert (option.decode_tokens_per_s, option.prefill_tokens_per_s) == (
            told.decode.tokens_per_s,
            told.prefill.tokens_per_s,
        )
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(("slower", "taken"), [(1.05, 0), (1.07, 1)])
def test_what_is_as_fast_to_within_the_predictions_error_is_kept_more_precise(slower: float, taken: int) -> None:
    def make(spec: ModelSpec) -> Plan:
        plan = make_plan(SPECS[1], WORK, 1 << 30, CPU)
        assert plan.prediction is not None
        passes = {name: _slower(getattr(plan.prediction, name), slower) for name in ("decode", "prefill")}
        return plan if spec is SPECS[1] else replace(plan, prediction=replace(plan.prediction, **passes))

    assert choose_format(SPECS, make, PlanInfeasibleError)[0] == taken


def _slower(one: PassPrediction, factor: float) -> PassPrediction:
    terms = replace(one.terms, **{f"{name}_s": factor * seconds for name, seconds in one.terms.as_dict().items()})
    return replace(one, terms=terms)


def test_what_does_not_fit_is_passed_over_and_told() -> None:
    assert least(SPECS[1]) < least(SPECS[0])
    best, plan = choose(least(SPECS[0]) - 1)
    assert best == 1
    assert plan.format_options[0].decode_tokens_per_s is None
    assert plan.format_options[0].speed_in_words == "does not fit"


def test_where_nothing_fits_the_smallest_says_what_would() -> None:
    with pytest.raises(PlanInfeasibleError) as caught:
        choose(least(SPECS[1]) - 1)
    assert caught.value.minimum_ram_nbytes == least(SPECS[1])


def test_without_a_prediction_there_is_nothing_to_choose_by() -> None:
    with pytest.raises(NotPredictedError, match="experts in int4"):
        choose(1 << 30, None, SPECS[1:])
