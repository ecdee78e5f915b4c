"""The simulator against the cost model where both are exact, against replayed policies, and against physics."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.hardware_profile import HardwareProfile
from placement.plan import Plan
from placement.planner import make_plan
from placement.simulator.machine import chrome_trace
from placement.simulator.simulate import Simulation, homes_of, simulate
from placement.tier_planner import make_tiered_plan
from placement.workload import Workload
from prefetch.policies.named import make_policy
from prefetch.policies.names import POLICIES
from prefetch.traces.replay import replay
from prefetch.traces.synthetic import SyntheticRouting, draw
from prefetch.traces.trace import RoutingTrace, TraceError
from tests.placement.machines import machine, model

LAYERS, EXPERTS, TOP_K = 6, 16, 4
SPEC = model(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, hidden=512, intermediate=256)
WORK = Workload(256, prompt_tokens=20, new_tokens=40)


def routed(batch: int = 1, skew: float = 0.0, prompt: int = 20, seed: int = 0) -> RoutingTrace:
    routing = SyntheticRouting(LAYERS, EXPERTS, TOP_K, skew=skew, locality=0.0, topic=0.0)
    return draw(routing, prompt, 40, seed, batch=batch)


def planned(profile: HardwareProfile, share: float, vram: int = 0, work: Workload = WORK) -> Plan:
    everything = make_plan(SPEC, work, 1 << 40)
    slots = max(2, round(share * everything.expert_count))
    ram = everything.peak_ram_nbytes - everything.ram.slot_nbytes + slots * everything.slot_nbytes
    return make_tiered_plan(SPEC, profile, work, ram, vram)


def run(plan: Plan, profile: HardwareProfile, trace: RoutingTrace, **options: Any) -> Simulation:
    return simulate(SPEC, profile, homes_of(plan), trace, **options)


@pytest.mark.parametrize("batch", [1, 4])
def test_with_all_in_ram_it_is_the_prediction(batch: int) -> None:
    profile = machine(gpu=False)
    plan = planned(profile, 1.0, work=replace(WORK, batch=batch))
    assert plan.prediction is not None
    # Decode is predicted half-way through the new tokens, which is the mean of all.
    found = run(plan, profile, routed(batch), batch=batch, warm=0)
    assert found.decode.hit_rate == 1.0
    tolerance = 2e-3 if batch == 1 else 0.03
    assert found.decode.tokens_per_s == pytest.approx(plan.prediction.decode.tokens_per_s, rel=tolerance)
    assert found.prefill.tokens_per_s == pytest.approx(plan.prediction.prefill.tokens_per_s, rel=0.05)
    assert found.decode.utilisation["cpu"] == pytest.approx(1.0)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_with_misses_it_is_near_the_prediction(share: float) -> None:
    profile = machine(gpu=False)
    plan = planned(profile, share)
    assert plan.prediction is not None
    found = run(plan, profile, draw(SyntheticRouting(LAYERS, EXPERTS, TOP_K, 0.0, 0.0, 0.0), 20, 400, 1))
    assert found.decode.hit_rate == pytest.approx(plan.prediction.decode.ram_hit_rate, abs=0.05)
    assert found.decode.tokens_per_s == pytest.approx(plan.prediction.decode.tokens_per_s, rel=0.10)
    assert found.decode.utilisation["disk"] > 0.3


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_an_arrival_takes_is_what_predictions_say(share: float) -> None:
    """More for each expert that arrives makes the simulation and the prediction as much slower."""

    def with_arrivals(decode_s: float, prompt_s: float) -> HardwareProfile:
        made = machine(gpu=False, disk=1e12)
        overheads = replace(made.cpu.overheads, step_arrival_s=decode_s, arrival_s=prompt_s)
        return replace(made, cpu=replace(made.cpu, overheads=overheads))

    trace = draw(SyntheticRouting(LAYERS, EXPERTS, TOP_K, 0.0, 0.0, 0.0), 20, 400, 1)
    plan = planned(with_arrivals(0.0, 0.0), share)
    before, after = (run(plan, with_arrivals(*seconds), trace) for seconds in ((0.0, 0.0), (2e-3, 1e-3)))
    missed = after.decode.experts - after.decode.in_ram
    assert after.decode.seconds - before.decode.seconds == pytest.approx(2e-3 * missed, rel=0.02)
    missed = after.prefill.experts - after.prefill.in_ram
    assert after.prefill.seconds - before.prefill.seconds == pytest.approx(1e-3 * missed)
    predicted = planned(with_arrivals(2e-3, 1e-3), share).prediction
    assert predicted is not None
    assert after.decode.tokens_per_s == pytest.approx(predicted.decode.tokens_per_s, rel=0.1), "hits differ a little"


@pytest.mark.parametrize("name", POLICIES)
def test_hits_are_those_of_the_replayed_policy(name: str) -> None:
    profile, trace = machine(gpu=False), routed(skew=0.7)
    plan = planned(profile, 0.4)
    found = run(plan, profile, trace, policy=make_policy(name, trace.geometry), warm=0)
    expected = replay(trace, make_policy(name, trace.geometry), plan.ram_slots)
    assert (found.decode.in_ram, found.decode.experts - found.decode.in_ram) == (
        expected.decode_hits, expected.decode_misses,
    )  # fmt: skip
    assert found.prefill.in_ram == expected.prefill_hits
    assert found.events == sum(len(step.experts) for step in trace.steps())


def test_the_accelerator_is_used_and_helps() -> None:
    trace = routed(skew=0.7)
    alone, both = machine(gpu=False), machine()
    slow = run(planned(alone, 0.6), alone, trace)
    plan = planned(both, 0.6, vram=(300 << 20) + 40 * SPEC.bundle_nbytes)
    assert plan.vram is not None and plan.vram.slots
    found = run(plan, both, trace)
    assert found.decode.in_vram > 0
    assert found.decode.utilisation["gpu"] > 0
    assert found.decode.tokens_per_s > slow.decode.tokens_per_s
    assert found.decode.in_vram + found.decode.in_ram <= found.decode.experts


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(["ram", "disk"]), st.floats(1, 20), st.floats(0.05, 1))
def test_a_faster_part_is_never_slower(part: str, times: float, share: float) -> None:
    trace = routed()
    speeds = {"ram": 2e10, "disk": 2e9}
    before, after = (machine(gpu=False, **(speeds | {part: factor * speeds[part]})) for factor in (1, times))
    plan = planned(before, share)
    assert run(plan, after, trace).decode.seconds <= run(plan, before, trace).decode.seconds * (1 + 1e-9)


@pytest.mark.parametrize("vram", [0, 400 << 20])
@pytest.mark.parametrize("prompt", [20, 3000])
def test_the_timeline_is_what_resources_did(vram: int, prompt: int) -> None:
    """No resource does two things at once, and their work adds up; 3000 tokens of a prompt are summed in order."""
    profile = machine()
    work = Workload(4096, prefill_chunk_tokens=4096, prompt_tokens=prompt, new_tokens=40)
    plan = planned(profile, 0.4, vram=vram, work=work)
    trace = routed(prompt=prompt)
    found = run(plan, profile, trace, warm=0, recorded=range(trace.passes))
    for name in ("cpu", "gpu", "link", "disk"):
        spans = sorted((span.start_s, span.seconds) for span in found.spans if span.resource == name)
        for (start, seconds), (after, _) in itertools.pairwise(spans):
            assert after >= start + seconds - 1e-9
        busy = found.decode.busy_s[name] + found.prefill.busy_s[name]
        assert sum(seconds for _, seconds in spans) == pytest.approx(busy)
    end = max(span.start_s + span.seconds for span in found.spans)
    assert end == pytest.approx(found.decode.seconds + found.prefill.seconds)
    data = chrome_trace(found.spans, "a plan")
    complete = [event for event in data["traceEvents"] if event["ph"] == "X"]
    assert len(complete) == len(found.spans)
    assert all(event["dur"] > 0 and event["ts"] >= 0 for event in complete)
    assert {event["args"]["name"] for event in data["traceEvents"] if event["ph"] == "M"} >= {"cpu", "disk"}


def test_equal_inputs_equal_simulations() -> None:
    profile, trace = machine(), routed(skew=0.5)
    plan = planned(profile, 0.5, vram=400 << 20)
    assert run(plan, profile, trace).decode == run(plan, profile, trace).decode


def test_another_models_trace_is_refused() -> None:
    trace = draw(SyntheticRouting(LAYERS, EXPERTS - 1, TOP_K), 4, 4, 0)
    with pytest.raises(TraceError, match="not of toy"):
        run(planned(machine(), 1.0), machine(), trace)
