"""Plans hold their budgets, and the least budget that they name is the least."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.model_spec import ModelSpec
from placement.plan import Plan
from placement.planner import (
    MINIMUM_SLOTS,
    READ_CHUNK_NBYTES,
    PlanInfeasibleError,
    activation_nbytes,
    fixed_ram,
    kv_nbytes,
    make_plan,
    pass_nbytes,
    read_chunk_nbytes,
    unused_ram_nbytes,
)
from placement.workload import Workload
from tests.placement import machines
from tests.placement.specs import experts, sizes, spec, specs, workloads

# Budgets around what the planner's decisions turn on, in bytes beyond the least one.
extras = st.integers(0, 1 << 36)


def least(model: ModelSpec, workload: Workload) -> int:
    with pytest.raises(PlanInfeasibleError) as caught:
        make_plan(model, workload, 0)
    return caught.value.minimum_ram_nbytes


@settings(deadline=None)
@given(specs, workloads, extras)
def test_a_plan_holds_its_budget(model: ModelSpec, workload: Workload, extra: int) -> None:
    budget = least(model, workload) + extra
    plan = make_plan(model, workload, budget)
    assert plan.peak_ram_nbytes == plan.ram.total_nbytes <= budget == plan.ram_budget_nbytes
    assert plan.ram.dense_nbytes == model.dense_nbytes
    assert plan.ram.kv_nbytes >= kv_nbytes(model, workload.batch, workload.context_tokens)
    assert plan.ram.slot_nbytes == plan.ram_slots * plan.slot_nbytes
    assert plan.slot_nbytes == max(layer.layout.nbytes for layer in model.experts)
    assert plan.slot_nbytes % 4096 == 0
    assert min(MINIMUM_SLOTS, plan.expert_count) <= plan.ram_slots <= plan.expert_count
    assert plan.expert_count == sum(layer.count for layer in model.experts)
    assert plan.expert_nbytes == sum(layer.count * layer.layout.nbytes for layer in model.experts)
    assert plan.disk_nbytes > plan.expert_nbytes, "headers and the manifest take room too"
    assert 0 < plan.resident_fraction <= 1
    # Whatever is left does not hold another slot.
    if plan.ram_slots < plan.expert_count:
        assert budget - plan.peak_ram_nbytes < plan.slot_nbytes


@settings(deadline=None)
@given(specs, workloads)
def test_the_least_budget_is_the_least(model: ModelSpec, workload: Workload) -> None:
    minimum = least(model, workload)
    plan = make_plan(model, workload, minimum)
    assert plan.minimum_ram_nbytes == minimum >= plan.peak_ram_nbytes
    # Where loading takes more than two slots, there is room for others.
    if plan.peak_ram_nbytes > plan.ram.dense_nbytes + model.load_scratch_nbytes + (16 << 20) + 4096:
        assert plan.ram_slots == min(MINIMUM_SLOTS, plan.expert_count)
        assert plan.peak_ram_nbytes == minimum
    with pytest.raises(PlanInfeasibleError, match=f"{minimum:,}") as caught:
        make_plan(model, workload, minimum - 1)
    assert caught.value.minimum_ram_nbytes == minimum


@settings(deadline=None)
@given(specs, workloads, extras, extras)
def test_more_memory_is_never_fewer_slots(model: ModelSpec, workload: Workload, one: int, other: int) -> None:
    minimum = least(model, workload)
    small, large = (make_plan(model, workload, minimum + extra) for extra in sorted((one, other)))
    assert small.ram_slots <= large.ram_slots


@settings(deadline=None)
@given(specs, workloads, extras)
def test_planning_is_deterministic(model: ModelSpec, workload: Workload, extra: int) -> None:
    budget = least(model, workload) + extra
    assert make_plan(model, workload, budget) == make_plan(model, workload, budget)


@settings(deadline=None)
@given(specs, workloads)
def test_enough_memory_holds_all_experts(model: ModelSpec, workload: Workload) -> None:
    plan = make_plan(model, workload, 1 << 60)
    assert plan.ram_slots == plan.expert_count
    assert plan.resident_fraction == 1.0


@settings(deadline=None)
@given(specs, workloads)
def test_loading_fits_into_what_running_has(model: ModelSpec, workload: Workload) -> None:
    ram = fixed_ram(model, workload)
    assert ram.kv_nbytes + ram.activation_nbytes >= model.load_scratch_nbytes
    # Slots are made when loading is over.
    for budget in (0, 1 << 60):
        try:
            plan = make_plan(model, workload, budget)
        except PlanInfeasibleError as error:
            plan = make_plan(model, workload, error.minimum_ram_nbytes)
        assert plan.peak_ram_nbytes - plan.ram.dense_nbytes >= model.load_scratch_nbytes
        assert plan.peak_ram_nbytes <= plan.ram_budget_nbytes


@settings(deadline=None)
@given(specs, st.integers(1, 64), st.integers(1, 4096), st.integers(0, 1 << 20), st.booleans(), st.data())
def test_a_larger_pass_never_needs_less(
    model: ModelSpec, batch: int, tokens: int, past: int, all_logits: bool, data: st.DataObject
) -> None:
    needed = pass_nbytes(model, batch, tokens, past, all_logits=all_logits)
    more = data.draw(st.integers(1, 1000))
    assert pass_nbytes(model, batch + more, tokens, past, all_logits=all_logits) >= needed
    assert pass_nbytes(model, batch, tokens + more, past, all_logits=all_logits) >= needed
    assert pass_nbytes(model, batch, tokens, past + more, all_logits=all_logits) >= needed
    assert pass_nbytes(model, batch, tokens, past, all_logits=True) >= needed


@settings(deadline=None)
@given(specs, workloads, st.data())
def test_a_pass_within_the_workload_needs_no_more_than_planned(
    model: ModelSpec, workload: Workload, data: st.DataObject
) -> None:
    tokens = data.draw(st.integers(1, min(workload.prefill_chunk_tokens, workload.context_tokens)))
    past = data.draw(st.integers(0, workload.context_tokens - tokens))
    batch = data.draw(st.integers(1, workload.batch))
    ram = fixed_ram(model, workload)
    assert pass_nbytes(model, batch, tokens, past, all_logits=False) <= ram.kv_nbytes + ram.activation_nbytes


def rows_nbytes(model: ModelSpec, rows: int) -> int:
    """Of a pass of so many tokens, without logits and what is kept."""
    output, hidden = 4 * model.hidden_size, 4 * max(layer.layout.intermediate for layer in model.experts)
    top_k = max(layer.top_k for layer in model.experts)
    if rows <= (64 << 20) // (top_k * output):
        return rows * (model.activation_nbytes_per_token + top_k * (output + hidden))
    return rows * (model.activation_nbytes_per_token + output) + max(rows, (4 << 20) // output) * (output + hidden)


@settings(deadline=None)
@given(specs, workloads, st.integers(1, 1 << 20), st.integers(1, 1 << 20), st.booleans(), st.data())
def test_what_a_workload_leaves_unused_none_of_its_passes_needs(
    model: ModelSpec, workload: Workload, prompt: int, new: int, paged: bool, data: st.DataObject
) -> None:
    workload = replace(workload, prompt_tokens=prompt, new_tokens=new)
    batch, context = workload.batch, workload.context_tokens
    chunk = min(context, workload.prefill_chunk_tokens)
    unused = unused_ram_nbytes(model, workload, paged=paged)
    kept = activation_nbytes(model, batch, 1, all_logits=False) - rows_nbytes(model, batch)
    for_passes = activation_nbytes(model, batch, chunk, all_logits=False) - kept
    if not paged:
        for_passes += kv_nbytes(model, batch, context)
    assert 0 <= unused < for_passes
    prompt = min(prompt, context)
    past = data.draw(st.integers(0, (prompt - 1) // chunk)) * chunk
    tokens = min(chunk, prompt - past)
    last = min(context, prompt + new)
    for reached, passed, repeated in ((past + tokens, tokens, past + tokens), (last, 1, 0)):
        cache = 0 if paged else kv_nbytes(model, batch, reached, repeated)
        assert cache + rows_nbytes(model, batch * passed) <= for_passes - unused


def test_a_workload_that_uses_all_of_its_context_leaves_nothing_unused() -> None:
    workload = Workload(1024, batch=2, prefill_chunk_tokens=64, prompt_tokens=1024)
    assert unused_ram_nbytes(spec(), workload, paged=False) == 0
    model = spec(attention_nbytes_per_token=4096)
    less = replace(workload, prompt_tokens=512, new_tokens=512)
    assert unused_ram_nbytes(model, less, paged=False) == 2 * 512 * 4096, "decode repeats no keys"


def test_the_expected_peak_is_no_more_than_the_plans() -> None:
    model, workload = machines.model(), Workload(4096, prompt_tokens=64, new_tokens=64)
    plan = make_plan(model, workload, 1 << 40, machines.machine(gpu=False))
    assert plan.prediction is not None
    unused = unused_ram_nbytes(model, workload, paged=False)
    assert unused > 0
    loading = plan.ram.dense_nbytes + model.load_scratch_nbytes + (16 << 20)
    # Allocators keep 30 MiB at most, 19 in the middle.
    assert plan.workload_peak_ram_nbytes == max(loading, plan.peak_ram_nbytes - unused - (11 << 20))
    assert replace(plan, prediction=None).workload_peak_ram_nbytes == plan.peak_ram_nbytes


@settings(deadline=None)
@given(sizes)
def test_one_expert_needs_one_slot(dense: int) -> None:
    model = spec(dense_nbytes=dense, experts=(experts(0, 1, 1, 64, 96),))
    plan = make_plan(model, Workload(10), least(model, Workload(10)))
    assert plan.ram_slots == plan.expert_count == 1


@given(st.integers(1, 1 << 18))
def test_an_expert_is_read_in_equal_pieces_and_no_more_than_it_takes(pages: int) -> None:
    nbytes = 4096 * pages
    piece = read_chunk_nbytes(nbytes)
    pieces = -(-nbytes // piece)
    assert piece % 4096 == 0
    assert piece <= READ_CHUNK_NBYTES
    assert pieces == -(-nbytes // READ_CHUNK_NBYTES)
    last = nbytes - (pieces - 1) * piece
    assert piece - last < 4096 * pieces, "what rounding to pages takes from the last one"


def test_slots_hold_the_largest_expert() -> None:
    layers = (experts(0, 2, 1, 64, 96), experts(1, 2, 1, 64, 4000), experts(2, 2, 1, 64, 32))
    plan: Plan = make_plan(spec(experts=layers), Workload(10), 1 << 40)
    assert plan.slot_nbytes == layers[1].layout.nbytes
    assert plan.experts_per_token == 3


@pytest.mark.parametrize("field", ["context_tokens", "batch", "prefill_chunk_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_workload_is_positive(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} must be positive"):
        Workload(**{"context_tokens": 1, field: value})
