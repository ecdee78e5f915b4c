"""Plans by sizes alone: what comes first, where a window begins, and what cannot be."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.kv import KvChoice, KvShape, minimum_nbytes
from placement.plan import Plan
from placement.planner import PlanInfeasibleError, make_plan
from placement.vram_planner import WINDOW_LAYERS, with_vram
from placement.workload import Workload
from tests.placement.machines import model

SMALL = model(layers=7, experts=4, top_k=2)
WORK = Workload(100)
BASE = make_plan(SMALL, WORK, 1 << 34)
SIZES = [layer.dense_nbytes for layer in SMALL.layers]
REST = SMALL.dense_nbytes - sum(SIZES)
LEAST = 2 * BASE.slot_nbytes


def test_everything_dense_and_slots_for_the_rest() -> None:
    plan = with_vram(SMALL, BASE, SMALL.dense_nbytes + LEAST)
    assert plan.vram is not None
    assert plan.vram.dense_layers == tuple(range(len(SIZES)))
    assert (plan.vram.head, plan.vram.window_layers, plan.vram.slots) == (True, 0, 2)
    assert plan.ram.dense_nbytes == 0
    assert (plan.dense_tier, plan.kv_tier) == ("vram", "ram")
    assert with_vram(SMALL, BASE, 1 << 40).vram.slots == SMALL.expert_count  # type: ignore[union-attr]


def test_one_byte_less_begins_a_window() -> None:
    plan = with_vram(SMALL, BASE, SMALL.dense_nbytes + LEAST - 1)
    if len(SIZES) > WINDOW_LAYERS:
        assert plan.vram is not None
        assert plan.vram.window_layers == WINDOW_LAYERS
        assert plan.ram.dense_nbytes == SMALL.dense_nbytes
        assert len(SIZES) - len(plan.vram.dense_layers) > WINDOW_LAYERS


def test_without_room_for_a_window_dense_weights_stay() -> None:
    plan = with_vram(SMALL, BASE, LEAST)
    assert plan.vram is not None
    assert (plan.vram.dense_layers, plan.vram.head, plan.vram.window_layers, plan.vram.slots) == ((), False, 0, 2)
    assert plan.ram == BASE.ram
    with pytest.raises(PlanInfeasibleError, match="does not hold one expert"):
        with_vram(SMALL, BASE, BASE.slot_nbytes - 1)


def test_a_gpu_holds_or_streams_everything_dense() -> None:
    with pytest.raises(PlanInfeasibleError, match=r"at least [\d,]+ bytes of VRAM") as caught:
        with_vram(SMALL, BASE, LEAST, runs_attention=True, other_nbytes=10)
    needed = int(str(caught.value).split("at least ")[1].split()[0].replace(",", ""))
    plan = with_vram(SMALL, BASE, needed, runs_attention=True, other_nbytes=10)
    assert plan.vram is not None
    assert plan.vram.use.activation_nbytes == 10
    assert plan.vram.use.kv_nbytes > 0
    with pytest.raises(PlanInfeasibleError):
        with_vram(SMALL, BASE, needed - 1, runs_attention=True, other_nbytes=10)


@given(st.integers(LEAST, 2 * SMALL.dense_nbytes + 4 * LEAST), st.booleans())
def test_budgets_hold(budget: int, on_gpu: bool) -> None:
    try:
        plan = with_vram(SMALL, BASE, budget, runs_attention=on_gpu)
    except PlanInfeasibleError:
        assert on_gpu
        return
    vram = plan.vram
    assert vram is not None
    assert vram.use.total_nbytes <= budget
    assert plan.ram.total_nbytes <= BASE.ram_budget_nbytes
    streamed = [index for index in range(len(SIZES)) if index not in vram.dense_layers]
    if vram.window_layers:
        held = sum(SIZES[index] for index in vram.dense_layers)
        assert vram.use.dense_nbytes == REST + held + WINDOW_LAYERS * max(SIZES)
        # Evenly: the widest gap between streamed layers is at most one more than the narrowest.
        gaps = [later - earlier for earlier, later in pairwise(streamed)]
        assert max(gaps) - min(gaps) <= 1


SHAPE = KvShape(8, 128, 128)
LONG_MODEL = model(layers=4, experts=8, top_k=2, kv_nbytes_per_token=4 * 4096, kv_shapes=(SHAPE,) * 4)
LONG = Workload(131072, prompt_tokens=100_000)


def _above(vram: int, wanted: int | None, ram: int = 1 << 31, format: str = "int8") -> Plan:
    base = make_plan(LONG_MODEL, LONG, ram, kv=KvChoice(format, vram_nbytes=wanted))
    return with_vram(LONG_MODEL, base, vram, kv_vram_nbytes=wanted)


@given(st.integers(20, 34), st.integers(28, 33), st.sampled_from(["int8", "int4", "auto"]), st.integers(1, 3))
def test_newest_blocks_come_after_dense_weights_and_before_slots(vram: int, ram: int, format: str, batch: int) -> None:
    work = replace(LONG, batch=batch)
    choice = KvChoice(format, blocks=True, vram_nbytes=None)
    try:
        base = make_plan(LONG_MODEL, work, 1 << ram, kv=choice)
        plan = with_vram(LONG_MODEL, base, 1 << vram, kv_vram_nbytes=None)
    except PlanInfeasibleError:
        return
    assert plan.vram is not None and plan.kv is not None and base.kv is not None
    use, kv = plan.vram.use, plan.kv
    assert use.total_nbytes <= 1 << vram and plan.ram.total_nbytes <= 1 << ram
    assert use.kv_nbytes == kv.vram_nbytes
    least = minimum_nbytes(LONG_MODEL, batch, kv.format, above=True)
    assert least <= kv.ram_nbytes <= base.kv.ram_nbytes
    assert (kv.vram_nbytes > 0) <= (use.dense_nbytes > 0), "blocks where no layer is"
    # No token is lost between the tiers, and what is above is not on disk as well.
    assert kv.vram_tokens <= work.context_tokens
    assert kv.spills_at_tokens is None or kv.spills_at_tokens >= kv.vram_tokens
    assert kv.disk_nbytes <= base.kv.disk_nbytes
    assert Plan.from_json(plan.to_json()) == plan


def test_all_of_a_cache_above_leaves_its_ram_to_experts() -> None:
    base, plan = make_plan(LONG_MODEL, LONG, 1 << 31, kv=KvChoice("int8", vram_nbytes=None)), _above(1 << 33, None)
    assert plan.kv is not None and base.kv is not None
    assert plan.kv.vram_tokens == LONG.context_tokens and plan.kv.spills_at_tokens is None
    assert plan.kv.ram_nbytes < base.kv.ram_nbytes // 4 and plan.kv.disk_nbytes == 0


def test_as_much_above_as_was_asked_for() -> None:
    asked = 1 << 28
    plan = _above(1 << 32, asked)
    assert plan.kv is not None
    assert asked - (1 << 20) < plan.kv.vram_nbytes <= asked
    held = plan.kv.vram_nbytes // plan.kv.nbytes_per_token
    assert held - 1024 < plan.kv.vram_tokens <= held + 128
    assert plan.vram is not None and plan.vram.slots == LONG_MODEL.expert_count
    assert _above(1 << 32, 0).kv == make_plan(LONG_MODEL, LONG, 1 << 31, kv=KvChoice("int8")).kv
    with pytest.raises(PlanInfeasibleError, match=r"kv_vram=\d+ leaves no room in vram="):
        _above(1 << 28, 1 << 30)


@pytest.mark.parametrize("wanted", [None, 64 << 20])
def test_a_gpu_that_runs_attention_has_newest_blocks_too(wanted: int | None) -> None:
    """Beside what it needs for itself; the others are below."""
    base = make_plan(LONG_MODEL, LONG, 1 << 31, kv=KvChoice("int8", vram_nbytes=wanted))
    other = 300 << 20
    plan = with_vram(LONG_MODEL, base, 2 << 30, runs_attention=True, other_nbytes=other, kv_vram_nbytes=wanted)
    assert plan.vram is not None and plan.kv is not None and base.kv is not None
    assert plan.vram.use.total_nbytes <= 2 << 30
    assert plan.vram.use.activation_nbytes == other
    assert 0 < plan.vram.use.kv_nbytes == plan.kv.vram_nbytes <= (1 << 31 if wanted is None else wanted)
    assert plan.kv_tier == base.kv_tier and plan.kv.vram_tokens > 0
    without = with_vram(LONG_MODEL, base, 2 << 30, runs_attention=True, other_nbytes=other, kv_vram_nbytes=0)
    assert without.vram is not None and without.kv is not None and without.vram.use.kv_nbytes == 0
    with pytest.raises(PlanInfeasibleError, match=r"KV cache [1-9]"):
        with_vram(LONG_MODEL, base, 2 << 30, runs_attention=True, other_nbytes=2 << 30, kv_vram_nbytes=64 << 20)


def test_blocks_without_a_layer_above_leave_room_for_themselves() -> None:
    """Where not even a window of dense weights fits, and blocks were asked for."""
    wanted, small = 4 << 20, 9 << 19
    base = make_plan(LONG_MODEL, LONG, 1 << 31, kv=KvChoice("int8", vram_nbytes=wanted))
    plan = with_vram(LONG_MODEL, base, small, kv_vram_nbytes=wanted)
    assert plan.vram is not None and plan.vram.use.dense_nbytes == 0
    assert 0 < plan.vram.use.kv_nbytes <= wanted
    assert plan.vram.use.total_nbytes <= small
    assert plan.vram.slots * plan.slot_nbytes + plan.vram.use.kv_nbytes <= small
