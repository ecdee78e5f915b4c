"""Hit rates of the runtime's policy on a trace, against replays of the whole trace at the size asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.planner import make_plan
from placement.policy_hits import MOST_STEPS, PolicyHits, part_of, policy_hits
from placement.routing import HitCurve
from placement.trace_analysis import decode_hits
from placement.trace_routing import routing_of
from placement.workload import Workload
from prefetch.policies.named import UnknownPolicyError, make_policy
from prefetch.traces.replay import CacheModel, keys_of
from prefetch.traces.synthetic import SyntheticRouting, draw
from prefetch.traces.trace import RoutingTrace, TraceError
from tests.placement.machines import machine, model

SMALL = SyntheticRouting(4, 32, 4, skew=0.5, locality=1.0, topic=0.5)
LARGE = SyntheticRouting(24, 48, 6, skew=0.4, locality=0.5, topic=0.5)


def replayed(trace: RoutingTrace, slots: int, policy: str = "forecast") -> float:
    """Of the whole trace, in the second half of decode."""
    cache = CacheModel(make_policy(policy, trace.geometry), slots)
    prompts = int(trace.pass_prefill.sum())
    counted = prompts + (trace.passes - prompts) // 2
    hits = needed = 0
    for number, step in enumerate(trace.steps()):
        keys = keys_of(trace, step)
        found = len(keys) - len(cache.step(keys, step.shares))
        if number // trace.geometry.layers >= counted:
            hits, needed = hits + found, needed + len(keys)
    return hits / needed


def rate(curve: HitCurve, slots: int) -> float:
    return float(curve.rate(np.array([float(slots)]))[0])


@pytest.mark.parametrize(("routing", "new", "batch"), [(SMALL, 200, 1), (SMALL, 80, 3), (LARGE, 120, 1)])
def test_rates_are_those_of_a_replay(routing: SyntheticRouting, new: int, batch: int) -> None:
    trace = draw(routing, 24, new, 3, batch=batch)
    curve = policy_hits(trace)
    for share in (0.08, 0.22, 0.5, 0.75):
        slots = round(share * trace.geometry.total)
        assert rate(curve, slots) == pytest.approx(replayed(trace, slots), abs=0.025), share
    assert rate(curve, trace.geometry.total) == 1.0
    assert rate(curve, 0) == 0.0


def test_the_default_policy_is_not_least_recently_used() -> None:
    trace = draw(LARGE, 24, 120, 3)
    slots = trace.geometry.total // 10
    assert rate(policy_hits(trace), slots) > rate(decode_hits(trace), slots) + 0.05
    assert rate(policy_hits(trace, "lru"), slots) == rate(decode_hits(trace), slots)
    assert rate(policy_hits(trace, "lfu"), slots) == pytest.approx(replayed(trace, slots, "lfu"), abs=0.03)


def test_of_a_large_trace_a_part_is_replayed() -> None:
    trace = draw(LARGE, 24, 400, 3)
    part = part_of(trace)
    assert part.passes * part.geometry.layers <= MOST_STEPS < trace.passes * trace.geometry.layers
    assert part.geometry.layers == 8
    assert np.array_equal(part.experts[:, -1], trace.experts[-len(part.experts) :, -1])
    short = draw(SMALL, 24, 50, 3)
    assert part_of(short) is short


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 5), st.integers(4, 20), st.integers(1, 4), st.integers(2, 12), st.integers(0, 99))
def test_more_slots_never_find_less(layers: int, experts: int, top_k: int, new: int, seed: int) -> None:
    trace = draw(SyntheticRouting(layers, experts, top_k, skew=0.5), 3, new, seed)
    rates = policy_hits(trace).rate(np.arange(layers * experts + 1) * 1.0)
    assert (np.diff(rates) >= 0).all()
    assert rates[0] == 0.0 and rates[-1] == 1.0


def test_more_memory_is_never_predicted_slower() -> None:
    spec = model(layers=4, experts=32, top_k=4)
    routing = routing_of(draw(SMALL, 24, 100, 3), spec)
    work = Workload(512, prompt_tokens=64, new_tokens=16)
    most = make_plan(spec, work, 1 << 34).peak_ram_nbytes
    seconds = []
    for slots in range(4, 129, 4):
        plan = make_plan(spec, work, most - (128 - slots) * spec.bundle_nbytes, machine(gpu=False), routing)
        assert plan.prediction is not None
        seconds.append(plan.prediction.decode.seconds)
    assert (np.diff(seconds) <= 1e-12).all()


def test_equal_traces_give_equal_rates() -> None:
    slots = np.arange(129) * 1.0
    one, other = (policy_hits(draw(SMALL, 24, 60, 3)).rate(slots) for _ in range(2))
    assert np.array_equal(one, other)


def test_what_cannot_be_replayed() -> None:
    with pytest.raises(TraceError, match="two passes of decode"):
        policy_hits(draw(SMALL, 24, 1, 3))
    with pytest.raises(UnknownPolicyError, match="best"):
        PolicyHits(draw(SMALL, 24, 4, 3), "best").rate(np.ones(1))
