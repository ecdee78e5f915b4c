"""The scheduler against every mapping there is, and what holds of any schedule."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.scheduler.records import Home, LayerCosts, Schedule, Unit
from prefetch.scheduler.scheduler import LayerScheduler, all_on_cpu, all_transferred

CASES = 2000
EXPERTS = 9
SOUND = 200


def random_costs(chance: np.random.Generator, *, disk: bool, linear_gpu: bool) -> LayerCosts:
    return LayerCosts(
        cpu_token_s=chance.uniform(0.1, 2.0),
        cpu_expert_s=chance.choice([0.0, 1.0]) * chance.uniform(0, 2),
        cpu_first_s=chance.choice([0.0, 1.0]) * chance.uniform(0, 2),
        gpu_expert_s=chance.uniform(0.05, 2.0),
        gpu_token_s=chance.uniform(0, 0.05) if linear_gpu else 0.0,
        gpu_before_s=chance.choice([0.0, 1.0]) * chance.uniform(0, 3),
        link_expert_s=chance.uniform(0.5, 6.0),
        disk_expert_s=chance.uniform(1.0, 10.0) if disk else 0.0,
        link_before_s=chance.choice([0.0, 1.0]) * chance.uniform(0, 3),
        disk_before_s=chance.choice([0.0, 1.0]) * chance.uniform(0, 3) if disk else 0.0,
    )


def brute_force(costs: LayerCosts, loads: Any, homes: Any) -> float:
    """The least makespan over all mappings, vectorised over mappings; written without the kernels.

    Things are served in the order in which they become ready, more tokens first.
    """
    count = len(loads)
    mappings = np.array(list(itertools.product((0, 1), repeat=count)), dtype=bool)  # True: GPU
    allowed = np.ones(len(mappings), dtype=bool)
    order = sorted(range(count), key=lambda expert: -loads[expert])
    disk, ready = costs.disk_before_s, np.zeros((count, len(mappings)))
    for expert in order:
        if homes[expert] == Home.VRAM:
            allowed &= mappings[:, expert]
        if homes[expert] == Home.DISK:
            disk += costs.disk_expert_s
            ready[expert] = disk
    link = np.full(len(mappings), costs.link_before_s)
    # All copies are ready in the order of `memory first, then by load`, which is the same for each mapping.
    for expert in sorted(order, key=lambda expert: homes[expert] == Home.DISK):
        if homes[expert] >= Home.RAM:
            moved = mappings[:, expert]
            link = np.where(moved, np.maximum(link, ready[expert]) + costs.link_expert_s, link)
            ready[expert] = np.where(moved, link, ready[expert])
    gpu, cpu = np.full(len(mappings), costs.gpu_before_s), np.zeros(len(mappings))
    started = np.zeros(len(mappings), dtype=bool)
    waiting = np.where(mappings.T, ready, np.inf)
    rows = np.arange(len(mappings))
    for _ in range(count):
        expert = waiting.argmin(axis=0)
        runs = np.isfinite(waiting[expert, rows])
        seconds = costs.gpu_expert_s + costs.gpu_token_s * loads[expert]
        gpu = np.where(runs, np.maximum(gpu, ready[expert, rows]) + seconds, gpu)
        waiting[expert, rows] = np.inf
    for expert in sorted(order, key=lambda expert: homes[expert] == Home.DISK):
        runs = ~mappings[:, expert]
        first = np.where(started, 0.0, costs.cpu_first_s)
        seconds = costs.cpu_expert_s + costs.cpu_token_s * loads[expert] + first
        cpu = np.where(runs, np.maximum(cpu, ready[expert]) + seconds, cpu)
        started |= runs
    return float(np.maximum(cpu, gpu)[allowed].min())


def assert_sound(schedule: Schedule, costs: LayerCosts, loads: Any, homes: Any) -> None:
    """Nothing is lost, doubled, or done before it can be; written against the record's definition alone."""
    count = len(loads)
    assert sorted([*schedule.cpu, *schedule.gpu]) == list(range(count))
    assert sorted(schedule.transfers) == [e for e in range(count) if homes[e] >= Home.RAM and e in schedule.gpu]
    assert sorted(schedule.reads) == [e for e in range(count) if homes[e] == Home.DISK]
    assert not any(homes[expert] == Home.VRAM for expert in schedule.cpu)
    here = dict.fromkeys(range(count), 0.0)
    clock = costs.disk_before_s
    for expert in schedule.reads:
        clock += costs.disk_expert_s
        here[expert] = clock
    clock = costs.link_before_s
    for expert in schedule.transfers:
        clock = max(clock, here[expert]) + costs.link_expert_s
        here[expert] = clock
    ends = []
    for order, start, before, each, token in (
        (schedule.cpu, 0.0, costs.cpu_first_s, costs.cpu_expert_s, costs.cpu_token_s),
        (schedule.gpu, costs.gpu_before_s, 0.0, costs.gpu_expert_s, costs.gpu_token_s),
    ):
        clock = start
        for place, expert in enumerate(order):
            clock = max(clock, here[expert]) + each + token * loads[expert] + (before if place == 0 else 0.0)
            assert schedule.finish_s[expert] == pytest.approx(clock)
        ends.append(clock)
    assert [schedule.cpu_s, schedule.gpu_s] == pytest.approx(ends)
    assert schedule.makespan_s == max(schedule.cpu_s, schedule.gpu_s)


def ratios(*, decode: bool, disk: bool, linear_gpu: bool, seed: int) -> np.ndarray[Any, Any]:
    """Makespan over the least there is, case by case."""
    chance = np.random.default_rng(seed)
    found = []
    for case in range(CASES):
        costs = random_costs(chance, disk=disk, linear_gpu=linear_gpu)
        count = int(chance.integers(1, EXPERTS + 1))
        loads = np.ones(count, np.int64) if decode else chance.integers(1, 40, count)
        homes = chance.integers(0, 4 if disk else 3, count)
        scheduler = LayerScheduler(costs)
        plan = scheduler.schedule(loads, homes)
        if case < SOUND:
            assert_sound(plan, costs, loads, homes)
        least = brute_force(costs, loads, homes)
        assert plan.makespan_s >= least * (1 - 1e-9), "better than everything there is"
        found.append(plan.makespan_s / least)
    return np.array(found)


def test_figure_5() -> None:
    """HybriMoE, figure 5: the CPU takes A, B, E; the GPU D, then C after its copy."""
    scheduler = LayerScheduler(LayerCosts(cpu_token_s=1.0, gpu_expert_s=2.0, link_expert_s=3.0))
    a, b, c, d, e = range(5)
    plan = scheduler.earliest_completion([1, 1, 3, 4, 1], [Home.RAM] * 3 + [Home.BOTH] * 2)
    assert plan.cpu.tolist() == [a, b, e]
    assert plan.gpu.tolist() == [d, c]
    assert plan.transfers.tolist() == [c]
    assert plan.finish_s.tolist() == [1.0, 2.0, 5.0, 2.0, 3.0]
    assert scheduler.schedule([1, 1, 3, 4, 1], [Home.RAM] * 3 + [Home.BOTH] * 2).makespan_s == plan.makespan_s


@pytest.mark.parametrize("linear_gpu", [False, True])
def test_decode_in_memory_is_optimal(linear_gpu: bool) -> None:
    assert ratios(decode=True, disk=False, linear_gpu=linear_gpu, seed=1).max() == pytest.approx(1.0)


def test_prefill_in_memory_is_optimal_where_the_gpu_does_not_count_tokens() -> None:
    assert ratios(decode=False, disk=False, linear_gpu=False, seed=2).max() == pytest.approx(1.0)


def test_prefill_is_near_the_optimum() -> None:
    found = ratios(decode=False, disk=False, linear_gpu=True, seed=3)
    assert found.mean() <= 1.001
    assert found.max() <= 1.01


@pytest.mark.parametrize("linear_gpu", [False, True])
def test_decode_with_reads_is_optimal(linear_gpu: bool) -> None:
    assert ratios(decode=True, disk=True, linear_gpu=linear_gpu, seed=5).max() == pytest.approx(1.0)


@pytest.mark.parametrize("linear_gpu", [False, True])
def test_prefill_with_reads_is_near_the_optimum(linear_gpu: bool) -> None:
    """Three tiers at once: a flow shop, of which the mappings that no other makes needless are searched."""
    found = ratios(decode=False, disk=True, linear_gpu=linear_gpu, seed=4)
    assert found.mean() <= 1.001
    assert found.max() <= 1.01


TIMES = st.floats(0, 50)
ACTIVE = st.lists(st.tuples(st.integers(1, 300), st.sampled_from(Home)), max_size=70)


@settings(max_examples=300, deadline=None)
@given(
    active=ACTIVE,
    costs=st.builds(
        LayerCosts, cpu_token_s=TIMES, cpu_expert_s=TIMES, cpu_first_s=TIMES, gpu_expert_s=TIMES, gpu_token_s=TIMES,
        gpu_before_s=TIMES, link_expert_s=TIMES, disk_expert_s=TIMES, link_before_s=TIMES, disk_before_s=TIMES,
    ),
)  # fmt: skip
def test_no_expert_is_lost_or_run_twice_and_no_static_mapping_is_better(
    active: list[tuple[int, Home]], costs: LayerCosts
) -> None:
    loads = np.array([load for load, _ in active], dtype=np.int64)
    homes = np.array([home for _, home in active], dtype=np.int64)
    scheduler = LayerScheduler(costs)
    plan = scheduler.schedule(loads, homes)
    assert_sound(plan, costs, loads, homes)
    for other in (
        scheduler.execute(all_on_cpu(homes), loads, homes),
        scheduler.execute(all_transferred(homes), loads, homes),
        scheduler.earliest_completion(loads, homes),
    ):
        assert_sound(other, costs, loads, homes)
        assert plan.makespan_s <= other.makespan_s * (1 + 1e-9) + 1e-12


def test_without_a_gpu_what_is_here_goes_first_and_the_most_tokens_are_read_first() -> None:
    scheduler = LayerScheduler(LayerCosts(cpu_token_s=1.0, disk_expert_s=4.0))
    plan = scheduler.schedule([2, 9, 1, 5], [Home.DISK, Home.DISK, Home.RAM, Home.RAM])
    assert plan.cpu.tolist() == [3, 2, 1, 0]
    assert plan.reads.tolist() == [1, 0]
    assert plan.gpu.tolist() == plan.transfers.tolist() == []
    assert plan.makespan_s == 17.0
    # No order of reads and products is better.
    jobs = [(4.0, 2.0), (4.0, 9.0), (0.0, 1.0), (0.0, 5.0)]
    least = []
    for order in itertools.permutations(jobs):
        read = done = 0.0
        for reading, computing in order:
            read += reading
            done = max(done, read if reading else 0.0) + computing
        least.append(done)
    assert plan.makespan_s == min(least)


def test_arguments_that_do_not_go_together_are_refused() -> None:
    scheduler = LayerScheduler(LayerCosts(cpu_token_s=1.0))
    with pytest.raises(ValueError, match="know no GPU"):
        scheduler.schedule([1], [Home.VRAM])
    with pytest.raises(ValueError, match="2 loads, 1 homes"):
        scheduler.schedule([1, 1], [Home.RAM])
    with pytest.raises(ValueError, match="disk_expert_s"):
        LayerCosts(cpu_token_s=1.0, disk_expert_s=float("inf"))
    with pytest.raises(ValueError, match="cpu_token_s"):
        LayerCosts(cpu_token_s=float("nan"))
    assert scheduler.schedule([], []).makespan_s == 0.0
    assert all_transferred(np.array([Home.RAM]))[0] == Unit.GPU
