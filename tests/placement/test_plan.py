"""A plan is JSON, and nothing that is not a plan is read as one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings

from placement.model_spec import ModelSpec
from placement.plan import Plan
from placement.planner import make_plan
from placement.workload import Workload
from tests.placement.specs import spec, specs, workloads

PLAN = make_plan(spec(), Workload(100, batch=2), 1 << 30)


def changed(*path: str, to: Any) -> str:
    data = json.loads(PLAN.to_json())
    *parents, last = path
    record = data
    for parent in parents:
        record = record[parent]
    record[last] = to
    return json.dumps(data)


def without(*path: str) -> str:
    data = json.loads(PLAN.to_json())
    *parents, last = path
    record = data
    for parent in parents:
        record = record[parent]
    del record[last]
    return json.dumps(data)


@settings(deadline=None)
@given(specs, workloads)
def test_a_plan_comes_back(model: ModelSpec, workload: Workload) -> None:
    plan = make_plan(model, workload, 1 << 60)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("version", [0, 1, -1, None, "1", 1.0, True, [1]])
def test_another_version_is_refused(version: Any) -> None:
    with pytest.raises(ValueError, match="not a plan of version 5"):
        Plan.from_json(changed("version", to=version))


def test_no_version_is_refused() -> None:
    with pytest.raises(ValueError, match="not a plan of version 5"):
        Plan.from_json(without("version"))


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "1", '"plan"', "[" * 100_000, '{"version": 3}'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Plan.from_json(text)


OPTIONAL = ("vram", "prediction", "kv")
FIELDS = [(name,) for name in json.loads(PLAN.to_json()) if name not in ("version", *OPTIONAL)]
FIELDS += [("workload", name) for name in json.loads(PLAN.to_json())["workload"]]
FIELDS += [("ram", name) for name in json.loads(PLAN.to_json())["ram"]]


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_missing_fields_and_wrong_types_are_refused(path: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"(?i){path[-1]}"):
        Plan.from_json(without(*path))
    for value in (None, 1.5, True, [], {}):
        if (path, value) == (("format_options",), []):
            continue
        with pytest.raises(ValueError):
            Plan.from_json(changed(*path, to=value))


@pytest.mark.parametrize("path", [("extra",), ("ram", "extra"), ("workload", "extra")], ids=".".join)
def test_unknown_fields_are_refused(path: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="extra"):
        Plan.from_json(changed(*path, to=1))


def test_an_unknown_tier_is_refused() -> None:
    with pytest.raises(ValueError, match="dense_tier"):
        Plan.from_json(changed("dense_tier", to="tape"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("ram_slots",), 0),
        (("ram_slots",), PLAN.expert_count + 1),
        (("ram", "slot_nbytes"), PLAN.ram.slot_nbytes + 4096),
        (("ram_budget_nbytes",), PLAN.peak_ram_nbytes - 1),
        (("workload", "batch"), 0),
    ],
    ids=str,
)
def test_figures_that_contradict_each_other_are_refused(path: tuple[str, ...], value: int) -> None:
    with pytest.raises(ValueError):
        Plan.from_json(changed(*path, to=value))
