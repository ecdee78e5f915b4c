"""The planner's chunk: against trying every size there is, and in the directions that it must go."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest

from placement.hardware_profile import HardwareProfile
from placement.plan import Plan
from placement.planner import PlanInfeasibleError, make_plan
from placement.prefill_chunk import SMALLEST_CHUNK_TOKENS, choose_chunk
from placement.workload import Workload
from tests.placement.machines import machine, model

SPEC = model(layers=4, experts=16, top_k=4, dense_layers=1)
CPU = machine(gpu=False)
WORK = Workload(3000, new_tokens=8, prefill_chunk_tokens=17)
LEAST = make_plan(SPEC, replace(WORK, prefill_chunk_tokens=WORK.context_tokens), 1 << 40).minimum_ram_nbytes


def planned(work: Workload, budget: int, profile: HardwareProfile | None = CPU) -> Plan:
    return make_plan(SPEC, work, budget, profile)


def seconds(tokens: int, budget: int, profile: HardwareProfile) -> float:
    work = replace(WORK, prompt_tokens=WORK.context_tokens, prefill_chunk_tokens=tokens)
    found = planned(work, budget, profile).prediction
    assert found is not None
    return found.prefill.terms.total_s + WORK.new_tokens * found.decode.terms.total_s


@pytest.mark.parametrize("slower", [1, 1000])
@pytest.mark.parametrize("slots_beside_longest", [-8, 0, 20, 60, 1000])
def test_no_size_is_predicted_to_be_much_faster(slots_beside_longest: int, slower: int) -> None:
    disk = CPU.disk
    assert disk is not None
    points = tuple(replace(one, bytes_per_s=one.bytes_per_s / slower) for one in disk.points)
    profile = replace(CPU, disk=replace(disk, points=points))
    budget = LEAST + slots_beside_longest * SPEC.bundle_nbytes
    chosen = choose_chunk(WORK, lambda work: planned(work, budget, profile))
    assert replace(chosen, prefill_chunk_tokens=17) == WORK, "something else was changed"
    every = []
    for tokens in range(1, WORK.context_tokens, 97):
        with suppress(PlanInfeasibleError):
            every.append(seconds(tokens, budget, profile))
    assert seconds(chosen.prefill_chunk_tokens, budget, profile) <= 1.05 * min(every)


def test_what_fits_sets_the_end() -> None:
    smallest = make_plan(SPEC, replace(WORK, prefill_chunk_tokens=SMALLEST_CHUNK_TOKENS), 1 << 40).minimum_ram_nbytes
    assert smallest < LEAST
    assert choose_chunk(WORK, lambda work: planned(work, smallest)).prefill_chunk_tokens == SMALLEST_CHUNK_TOKENS
    with pytest.raises(PlanInfeasibleError):
        choose_chunk(WORK, lambda work: planned(work, smallest - 1))


def test_a_context_below_the_smallest_chunk_is_one_chunk() -> None:
    work = replace(WORK, context_tokens=50)
    assert choose_chunk(work, lambda work: planned(work, 1 << 40)).prefill_chunk_tokens == 50


def test_without_a_prediction_nothing_is_chosen() -> None:
    with pytest.raises(ValueError, match="without a prediction"):
        choose_chunk(WORK, lambda work: planned(work, 1 << 40, None))
