"""Figures of traces against what they were drawn with, and against the policies that are replayed."""

from __future__ import annotations

import numpy as np
import pytest

from placement.kept_hits import kept_hits
from placement.planner import make_plan
from placement.policy_hits import policy_hits
from placement.predict import UNCERTAINTY, predict
from placement.routing import Popularity
from placement.simulator.simulate import homes_of
from placement.trace_analysis import Requests, decode_hits, expert_counts, fit_popularity
from placement.trace_routing import routing_of
from placement.workload import Workload
from prefetch.policies.geometry import Geometry
from prefetch.policies.lru import LruPolicy
from prefetch.traces.replay import CacheModel, keys_of
from prefetch.traces.synthetic import SyntheticRouting, draw
from prefetch.traces.trace import RoutingTrace, TraceError
from tests.placement.machines import machine, model

PLAIN = {"locality": 0.0, "topic": 0.0}


def trace_of(skew: float, prompt: int = 24, new: int = 200, batch: int = 1, **changed: float) -> RoutingTrace:
    return draw(SyntheticRouting(4, 32, 4, skew=skew, **{**PLAIN, **changed}), prompt, new, 3, batch=batch)  # type: ignore[arg-type]


def test_requests_are_the_steps_of_the_trace() -> None:
    trace = trace_of(0.5, prompt=9, new=6, batch=2)
    requests = Requests.of(trace)
    steps = list(trace.steps())
    assert requests.keys.tolist() == [key for step in steps for key in keys_of(trace, step)]
    sizes = np.diff(requests.steps, append=len(requests.keys))
    assert sizes.tolist() == [len(step.experts) for step in steps]
    assert np.repeat([not step.prefill for step in steps], sizes).tolist() == requests.decode.tolist()
    counted = np.repeat([number // 4 >= 4 for number in range(len(steps))], sizes)
    assert counted.tolist() == requests.late.tolist(), "one prefill, three passes that only fill slots"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("skew", [0.0, 0.8])
def test_hit_rates_are_those_of_a_least_recently_used_cache(skew: float, batch: int) -> None:
    trace = trace_of(skew, new=60, batch=batch, locality=1.0)
    curve = decode_hits(trace)
    for slots in (16, 40, 90, 127):
        cache = CacheModel(LruPolicy(), slots)
        hits = needed = 0
        for number, step in enumerate(trace.steps()):
            keys = keys_of(trace, step)
            missing = cache.step(keys, step.shares)
            if not step.prefill and number // 4 > 30:
                needed += len(keys)
                hits += len(keys) - len(missing)
        assert curve.rate(np.array([float(slots)]))[0] == pytest.approx(hits / needed, abs=0.015)
    assert curve.rate(np.array([128.0]))[0] == 1.0


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.2])
def test_the_skew_is_found(skew: float) -> None:
    found = fit_popularity(trace_of(skew, prompt=400, new=400))
    assert found.skew == pytest.approx(skew, abs=0.15)
    assert found.locality < 0.05


def test_locality_is_what_repeats_beyond_chance() -> None:
    generator = np.random.default_rng(1)
    tokens = np.empty((600, 1, 4), np.uint16)
    for token in range(600):
        repeat = token and generator.random() < 0.4
        tokens[token, 0] = tokens[token - 1, 0] if repeat else generator.permutation(32)[:4]
    one = np.ones(600, np.int32)
    trace = RoutingTrace("repeats", Geometry((32,)), 4, one, np.zeros(600, bool), tokens)
    assert fit_popularity(trace).locality == pytest.approx(0.4, abs=0.06)
    prefill = RoutingTrace("repeats", Geometry((32,)), 4, np.array([600], np.int32), np.ones(1, bool), tokens)
    assert fit_popularity(prefill).locality == pytest.approx(0.4, abs=0.06), "neighbours in a pass tell it too"


def test_counts_are_of_tokens() -> None:
    trace = trace_of(0.5, new=20)
    for layer, counts in enumerate(expert_counts(trace)):
        assert counts.sum() == len(trace.experts) * 4
        assert counts[7] == (trace.experts[:, layer] == 7).sum()


def test_what_is_too_short_is_refused() -> None:
    with pytest.raises(TraceError, match="two passes of decode"):
        decode_hits(trace_of(0.0, new=1))
    with pytest.raises(TraceError, match="two tokens"):
        fit_popularity(trace_of(0.0, prompt=0, new=1))


def test_a_prediction_takes_hits_of_the_trace_and_popularity_for_the_rest() -> None:
    spec = model(layers=4, experts=32, top_k=4)
    trace = trace_of(0.9, locality=2.0, topic=1.0)
    routing = routing_of(trace, spec)
    work = Workload(512, prompt_tokens=64, new_tokens=16)
    least = make_plan(spec, work, 1 << 34).peak_ram_nbytes
    plan = make_plan(spec, work, least - 64 * spec.bundle_nbytes)
    told = predict(spec, machine(gpu=False), homes_of(plan), work, routing)
    expected = policy_hits(trace).rate(np.array([float(plan.ram_slots)]))[0]
    assert told.decode.ram_hit_rate == pytest.approx(expected)
    assert trace.name in told.routing
    low_s = told.decode.seconds / (1 + UNCERTAINTY["measured"])
    assert told.decode.low_s == pytest.approx(low_s), "no popularity is guessed at"
    batched = predict(spec, machine(gpu=False), homes_of(plan), Workload(512, 4, prompt_tokens=64), routing)
    stated = kept_hits(((32, 4),) * 4, routing.popularity, 4).rate(np.array([float(plan.ram_slots)]))[0]
    assert batched.decode.ram_hit_rate == pytest.approx(stated), "the trace has passes of one token"
    assert isinstance(routing.popularity, Popularity)


def test_another_models_trace_is_refused() -> None:
    with pytest.raises(TraceError, match="record one of this model"):
        routing_of(trace_of(0.0), model(layers=4, experts=32, top_k=2))
    with pytest.raises(TraceError, match="record one of this model"):
        routing_of(trace_of(0.0), model(layers=3, experts=32, top_k=4))
