"""Plans by sizes alone: what comes first, where a window begins, and what cannot be."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
