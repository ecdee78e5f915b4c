"""The ablation runs, and its simulation takes what its schedules take."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import ablation
from benchmarks.ablation_machine import Model
from benchmarks.ablation_simulation import Parts, Simulation
from prefetch.traces.synthetic import draw
from prefetch.traces.trace import RoutingTrace

TINY = Model("tiny", layers=2, experts=8, top_k=2, expert_parameters=1e7, dense_parameters=1e6, skew=0.5, locality=1.0)
IDS = np.tile(np.arange(8), (2, 1))


def seconds(parts: Parts, trace: RoutingTrace, cached: float = 0.5) -> float:
    return Simulation(TINY, cached, parts, IDS, seed=1).run(trace)


def test_the_static_mapping_takes_what_its_misses_take() -> None:
    trace = draw(TINY.routing, 0, 20, seed=3)
    costs, expected = TINY.costs, 0.0
    for token in trace.experts:
        for layer in token:
            misses = int((layer >= 4).sum())
            cpu_s = misses * (costs.cpu_expert_s + costs.cpu_token_s) + bool(misses) * costs.cpu_first_s
            expected += max(cpu_s, (2 - misses) * (costs.gpu_expert_s + costs.gpu_token_s)) + TINY.dense_s(1)
    assert seconds(Parts(), trace) == pytest.approx(expected)


def test_everything_is_on_the_gpu_where_everything_fits() -> None:
    trace = draw(TINY.routing, 0, 20, seed=3)
    resident = seconds(Parts(), trace, cached=1.0)
    assert seconds(Parts(scheduling=True, prefetch=True, caching=True), trace, cached=1.0) == resident
    assert seconds(Parts(scheduling=True, prefetch=True, caching=True), trace) > resident


def test_a_schedule_is_no_slower_than_static_mappings() -> None:
    trace = draw(TINY.routing, 64, 0, seed=3)
    scheduled = seconds(Parts(scheduling=True), trace)
    assert scheduled <= seconds(Parts(), trace) * (1 + 1e-9)
    assert scheduled <= seconds(Parts(copy_all=True), trace) * (1 + 1e-9)


def test_runs_and_reports() -> None:
    report = ablation.run(ablation.AblationScale((0.5,), (8,), 6, 2, 2, 4, 4), (TINY,))
    assert {title: len(rows) for title, rows in report.tables.items()} == {
        "Simulated: speed over a static mapping": 2,
        "Executed: speed over a static mapping": 2,
    }
    assert len(report.gates) == 2 * len(ablation.EXECUTED)
    assert len(report.targets) == 8
