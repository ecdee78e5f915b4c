"""Dense models on machines with an accelerator: the window is chosen, and its seconds are those of the link."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.dense_cost import streamed_s
from placement.homes import Homes
from placement.kv import KvShape
from placement.model_spec import LayerSpec, LinearSpec, ModelSpec
from placement.plan import Plan
from placement.planner import PlanInfeasibleError, make_plan, predicted
from placement.predict import predict
from placement.rig import Rig, cheapest_doubling, sweep
from placement.tier_planner import make_tiered_plan
from placement.workload import Workload
from tests.placement.machines import machine
from tests.placement.specs import spec

WORK = Workload(1024, prompt_tokens=200, new_tokens=50)
LINEARS = (LinearSpec(1024, 256, "bf16", 3), LinearSpec(256, 1024, "bf16"))
LAYERS = 20
EVERY = tuple(range(LAYERS))


def dense_model(layers: int = LAYERS) -> ModelSpec:
    nbytes = sum(one.nbytes for one in LINEARS)
    head = LinearSpec(1000, 256, "bf16")
    return spec(
        hidden_size=256, layer_count=layers, dense_nbytes=layers * nbytes + 2 * head.nbytes, experts=(), head=head,
        layers=tuple(LayerSpec(nbytes, LINEARS, 1024, 512, None, None) for _ in range(layers)),
        kv_nbytes_per_token=1024 * layers, kv_shapes=(KvShape(1, 256, 256),) * layers,
    )  # fmt: skip


MODEL = dense_model()
MACHINE = machine()
RAM = 1 << 32


def tiered(vram: int, ram: int = RAM) -> Plan:
    return make_tiered_plan(MODEL, MACHINE, WORK, ram, vram)


def least_vram() -> int:
    """The first byte with which something is above."""
    low, high = 0, 1 << 32
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tiered(middle).vram is None else (low, middle)
    return high


def test_without_experts_a_plan_has_nothing_of_them() -> None:
    plan = make_plan(MODEL, WORK, RAM, MACHINE)
    assert (plan.expert_count, plan.expert_nbytes, plan.experts_per_token, plan.ram_slots, plan.disk_nbytes) == (0,) * 5
    assert (plan.ram.slot_nbytes, plan.resident_fraction, plan.dense_tier) == (0, 1.0, "ram")
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.prediction is not None
    for one in (plan.prediction.decode, plan.prediction.prefill):
        terms = one.terms
        assert terms.cpu_experts_s == terms.gpu_experts_s == terms.disk_s == terms.link_s == one.read_nbytes == 0
        assert one.low_s < one.seconds < one.high_s
    assert plan.prediction.routing == "no experts, nothing is routed"


def test_the_least_ram_is_exact_and_names_no_slots() -> None:
    with pytest.raises(PlanInfeasibleError, match="dense weights") as caught:
        make_plan(MODEL, WORK, 0)
    assert "slots" not in str(caught.value)
    least = caught.value.minimum_ram_nbytes
    assert make_plan(MODEL, WORK, least).peak_ram_nbytes <= least
    with pytest.raises(PlanInfeasibleError):
        make_plan(MODEL, WORK, least - 1)


def test_from_the_cpu_by_a_window_to_everything_above() -> None:
    first = least_vram()
    assert tiered(first - 1) == make_plan(MODEL, WORK, RAM, MACHINE)
    assert tiered(0) == make_plan(MODEL, WORK, RAM, MACHINE)
    before = None
    for extra in range(0, MODEL.dense_nbytes + (1 << 21), 1 << 20):
        plan = tiered(first + extra)
        assert plan.vram is not None and plan.prediction is not None
        assert plan.vram.use.total_nbytes <= first + extra
        speed = plan.prediction.decode.tokens_per_s
        if before is not None:
            assert speed >= before[0]
            assert len(plan.vram.dense_layers) >= before[1]
        before = speed, len(plan.vram.dense_layers)
        if plan.vram.window_layers:
            assert plan.prediction.decode.link_busy_s > 0
            assert plan.ram.dense_nbytes == MODEL.dense_nbytes
    assert (plan.vram.window_layers, plan.vram.dense_layers, plan.ram.dense_nbytes) == (0, EVERY, 0)
    assert plan.prediction.decode.terms.link_s == plan.prediction.decode.link_busy_s == 0


def test_a_pass_takes_as_long_as_the_link_or_the_accelerator() -> None:
    """By hand: seconds of everything above, and what the link takes beyond."""
    above = Homes(EVERY, EVERY, True, 0, 0, 4 << 20, 4)
    there = predict(MODEL, MACHINE, above, WORK).decode
    for streamed in (EVERY[:1], EVERY[::4], EVERY):
        homes = replace(above, dense_streamed=streamed)
        link_s = sum(MACHINE.to_gpu.seconds(MODEL.layers[index].dense_nbytes) for index in streamed)
        assert streamed_s(MODEL, MACHINE, homes) == pytest.approx(link_s)
        found = predict(MODEL, MACHINE, homes, WORK).decode
        assert found.seconds == pytest.approx(max(there.seconds, link_s))
        assert found.terms.link_s == pytest.approx(max(0.0, link_s - there.seconds))
        assert (found.link_busy_s, found.gpu_busy_s) == (pytest.approx(link_s), there.gpu_busy_s)
    assert found.seconds > there.seconds


def test_a_window_is_predicted_as_it_is_executed() -> None:
    """The KV cache is above, that of streamed layers too; in blocks it is not."""
    plan = tiered(least_vram() + 2 * MODEL.layers[0].dense_nbytes)
    assert plan.vram is not None and plan.vram.window_layers
    streamed = tuple(index for index in EVERY if index not in plan.vram.dense_layers)
    homes = Homes(EVERY, EVERY, True, 0, 0, 4 << 20, 4, streamed)
    assert plan.prediction == predict(MODEL, MACHINE, homes, WORK)
    assert plan.kv_tier == "vram"
    with pytest.raises(ValueError, match="profile of the accelerator"):
        predicted(MODEL, machine(gpu=False), 0, WORK, vram=plan.vram)
    with pytest.raises(ValueError, match="computes there"):
        replace(homes, dense_in_vram=EVERY[1:], kv_in_vram=())


def test_a_context_that_does_not_fit_above_lies_in_blocks() -> None:
    long = Workload(1 << 18, prompt_tokens=200, new_tokens=50)
    plan = make_tiered_plan(MODEL, MACHINE, long, 1 << 36, 1 << 30)
    assert plan.vram is not None and plan.kv is not None and plan.prediction is not None
    assert plan.kv_tier == "ram"
    assert plan.vram.use.total_nbytes <= 1 << 30
    assert 0 < plan.kv.vram_tokens < long.context_tokens
    assert math.isfinite(plan.prediction.decode.seconds)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1 << 30), st.integers(1 << 28, 1 << 34), st.integers(1, 6000))
def test_budgets_hold(vram: int, ram: int, context: int) -> None:
    work = Workload(context, prompt_tokens=max(1, context // 2), new_tokens=8)
    plan = make_tiered_plan(MODEL, MACHINE, work, ram, vram)
    assert plan.ram.total_nbytes <= ram
    assert plan.vram is None or plan.vram.use.total_nbytes <= vram
    assert plan.prediction is not None
    assert 0 < plan.prediction.decode.seconds < math.inf


def test_what_ifs() -> None:
    rig = Rig(MACHINE, RAM, least_vram())
    plan = rig.plan(MODEL, WORK)
    found, best = cheapest_doubling(rig, plan, MODEL)
    assert best.decode_tokens_per_s > 0
    assert found is None or found.decode_tokens_per_s >= 2 * plan.prediction.decode.tokens_per_s  # type: ignore[union-attr]
    curves = sweep(rig, plan, MODEL)
    assert all(math.isfinite(speed) for points in curves.values() for _, speed in points)
    assert curves["vram"][0][1] == make_plan(MODEL, WORK, RAM, MACHINE).prediction.decode.tokens_per_s  # type: ignore[union-attr]
