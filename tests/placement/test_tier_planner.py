"""Plans over three tiers: within budgets, never slower with more, and as fast as trying everything."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.dense_cost import attention_s
from placement.hardware_profile import HardwareProfile
from placement.homes import Homes
from placement.kv import KvChoice, KvShape, largest_block_nbytes
from placement.kv_cost import in_blocks
from placement.kv_settings import PIECES_NBYTES
from placement.memory_use import ram_use, vram_beside_weights, vram_use
from placement.model_spec import ModelSpec
from placement.passes import decode_pass
from placement.plan import Plan
from placement.planner import PlanInfeasibleError, make_plan, nothing_in_vram
from placement.predict import Routing, expected_s
from placement.tier_planner import make_tiered_plan
from placement.vram_planner import with_vram
from placement.workload import Workload
from tests.placement.machines import machine, machines, model

WORK = Workload(512, prompt_tokens=200, new_tokens=50)
# What every plan with something in VRAM takes there: activations, staging, workspace.
SMALL = model(layers=2, experts=4, top_k=2)


def fixed_vram(spec: ModelSpec) -> int:
    return vram_use(spec, WORK, replace(nothing_in_vram(spec), head_in_vram=True)).activation_nbytes


def least_ram(spec: ModelSpec) -> int:
    with pytest.raises(PlanInfeasibleError) as caught:
        make_plan(spec, WORK, 0)
    return caught.value.minimum_ram_nbytes


def request_s(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.request_s(plan.workload.new_tokens)


def all_homes(spec: ModelSpec) -> Iterator[Homes]:
    """Every subset of layers, of KV caches, the output layer, and every number of slots."""
    layers = range(len(spec.layers))
    for states in itertools.product(range(3), repeat=len(spec.layers)):
        dense = tuple(i for i in layers if states[i] > 0)
        kv = tuple(i for i in layers if states[i] > 1)
        for head, vram, ram in itertools.product(
            (False, True), range(spec.expert_count + 1), range(2, spec.expert_count + 1)
        ):
            yield replace(
                nothing_in_vram(spec, ram), dense_in_vram=dense, kv_in_vram=kv, head_in_vram=head, vram_slots=vram
            )


def brute_force(spec: ModelSpec, profile: HardwareProfile, ram: int, vram: int) -> float:
    seconds = [
        expected_s(spec, profile, homes, WORK)
        for homes in all_homes(spec)
        if ram_use(spec, WORK, homes).total_nbytes <= ram and vram_use(spec, WORK, homes).total_nbytes <= vram
    ]
    return min(seconds)


@pytest.mark.parametrize("seed", range(4))
def test_as_fast_as_trying_everything(seed: int) -> None:
    random_ = random.Random(seed)
    spec = model(layers=2, experts=3, top_k=random_.choice((1, 2)), dense_layers=seed % 2)
    profile = machine(link=random_.choice((1e9, 1e10, 6e10)), disk=random_.choice((5e8, 5e9)))
    ram = least_ram(spec) + random_.randrange(spec.expert_nbytes)
    vram = fixed_vram(spec) + random_.randrange(spec.dense_nbytes + spec.expert_nbytes)
    plan = make_tiered_plan(spec, profile, WORK, ram, vram)
    assert request_s(plan) <= 1.01 * brute_force(spec, profile, ram, vram)


def test_the_greedy_order_is_close_to_all_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = model(layers=9, experts=16, top_k=4, dense_layers=2)
    for link, extra in itertools.product((2e9, 3e10), (0.1, 0.3, 0.6, 0.9)):
        budgets = least_ram(spec) + spec.expert_nbytes // 2, fixed_vram(spec) + int(extra * spec.dense_nbytes)
        greedy = make_tiered_plan(spec, machine(link=link), WORK, *budgets)
        with monkeypatch.context() as patch:
            patch.setattr("placement.dense_choices.MOST_COMBINATIONS", 1 << 30)
            everything = make_tiered_plan(spec, machine(link=link), WORK, *budgets)
        assert request_s(greedy) <= 1.01 * request_s(everything)


budgets = st.integers(0, 3 * SMALL.expert_nbytes)


@settings(deadline=None, max_examples=40)
@given(machines, budgets, budgets, st.floats(0, 1.5))
def test_never_over_budget(profile: HardwareProfile, ram: int, vram: int, skew: float) -> None:
    ram, vram = least_ram(SMALL) + ram, fixed_vram(SMALL) // 2 + vram
    plan = make_tiered_plan(SMALL, profile, WORK, ram, vram, Routing.stated(skew))
    assert plan.ram.total_nbytes <= ram
    if plan.vram is not None:
        assert profile.gpu is not None
        assert plan.vram.use.total_nbytes <= vram == plan.vram.budget_nbytes
        assert plan.vram.use.slot_nbytes == plan.vram.slots * plan.slot_nbytes
    assert Plan.from_json(plan.to_json()) == plan
    assert plan == make_tiered_plan(SMALL, profile, WORK, ram, vram, Routing.stated(skew))


@settings(deadline=None, max_examples=40)
@given(machines, budgets, budgets, budgets, st.booleans())
def test_more_memory_is_never_slower(profile: HardwareProfile, ram: int, vram: int, more: int, in_ram: bool) -> None:
    ram, vram = least_ram(SMALL) + ram, fixed_vram(SMALL) // 2 + vram
    before = make_tiered_plan(SMALL, profile, WORK, ram, vram)
    after = make_tiered_plan(SMALL, profile, WORK, ram + more * in_ram, vram + more * (not in_ram))
    assert request_s(after) <= request_s(before) * (1 + 1e-9)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["ram", "vram", "link", "disk"]), st.floats(1, 50), budgets, budgets)
def test_a_faster_part_is_never_slower(part: str, times: float, ram: int, vram: int) -> None:
    speeds = {"ram": 2e10, "vram": 3e11, "link": 1e10, "disk": 2e9}
    faster = speeds | {part: times * speeds[part]}
    ram, vram = least_ram(SMALL) + ram, fixed_vram(SMALL) // 2 + vram
    before, after = (
        make_tiered_plan(SMALL, machine(**one), WORK, ram, vram)  # type: ignore[arg-type]
        for one in (speeds, faster)
    )
    assert request_s(after) <= request_s(before) * (1 + 1e-9)


def test_without_an_accelerator_it_is_the_runtimes_plan() -> None:
    ram = least_ram(SMALL) + 2 * SMALL.bundle_nbytes
    for profile, vram in ((machine(gpu=False), 1 << 40), (machine(), 0)):
        assert make_tiered_plan(SMALL, profile, WORK, ram, vram) == make_plan(SMALL, WORK, ram, profile)
    plan = make_plan(SMALL, WORK, ram, machine(gpu=False))
    assert replace(plan, prediction=None) == make_plan(SMALL, WORK, ram)


def test_vram_makes_up_for_ram() -> None:
    least = least_ram(SMALL)
    with pytest.raises(PlanInfeasibleError) as caught:
        make_tiered_plan(SMALL, machine(), WORK, 0, 1 << 40)
    minimum = caught.value.minimum_ram_nbytes
    assert minimum < least
    assert make_tiered_plan(SMALL, machine(), WORK, minimum, 1 << 40).minimum_ram_nbytes == minimum
    with pytest.raises(PlanInfeasibleError):
        make_tiered_plan(SMALL, machine(), WORK, minimum - 1, 1 << 40)
    with pytest.raises(PlanInfeasibleError) as caught:
        make_tiered_plan(SMALL, machine(), WORK, 0, 1)
    assert caught.value.minimum_ram_nbytes == least


def test_enough_vram_holds_everything() -> None:
    plan = make_tiered_plan(SMALL, machine(), WORK, 1 << 40, 1 << 40)
    assert plan.vram is not None
    assert (plan.dense_tier, plan.kv_tier, plan.vram.head) == ("vram", "vram", True)
    assert plan.vram.slots == SMALL.expert_count
    assert plan.prediction is not None
    assert plan.prediction.decode.vram_hit_rate == pytest.approx(1.0)


def test_a_large_model_is_planned() -> None:
    spec = model(layers=61, experts=256, top_k=8, dense_layers=3, hidden=2048, intermediate=512)
    plan = make_tiered_plan(spec, machine(), WORK, 40 << 30, 16 << 30)
    assert plan.vram is not None
    assert plan.vram.slots > 0


PAGED = model(
    layers=3, experts=8, top_k=2, kv_nbytes_per_token=3 * 1024, kv_shapes=(KvShape(2, 128, 128),) * 3, dtype="bf16"
)
LONG = Workload(16384, prompt_tokens=16000, new_tokens=50)


def test_a_cache_that_was_wished_for_lies_in_blocks_below_the_accelerator() -> None:
    kv = KvChoice("int8")
    plan = make_tiered_plan(PAGED, machine(), LONG, 1 << 34, 1 << 34, kv=kv)
    assert plan.kv is not None and plan.vram is not None and plan.prediction is not None
    assert (plan.kv.format, plan.kv.spills_at_tokens, plan.kv_tier, plan.vram.kv_layers) == ("int8", None, "ram", ())
    assert plan.dense_tier == "vram"
    assert plan.ram.kv_nbytes >= plan.kv.ram_nbytes > LONG.context_tokens * plan.kv.nbytes_per_token
    whole = make_tiered_plan(PAGED, machine(), LONG, 1 << 34, 1 << 34)
    assert whole.kv is None and whole.vram is not None
    assert plan.vram.use.activation_nbytes == whole.vram.use.activation_nbytes + PIECES_NBYTES
    assert whole.prediction is not None, "and it is faster, for the accelerator attends to it"
    assert whole.prediction.decode.tokens_per_s > plan.prediction.decode.tokens_per_s
    minimum = plan.minimum_ram_nbytes
    least = make_tiered_plan(PAGED, machine(), LONG, minimum, 1 << 34, kv=kv)
    assert least.kv is not None and least.kv.spills_at_tokens is not None
    assert (least.minimum_ram_nbytes, least.peak_ram_nbytes <= minimum) == (minimum, True)
    with pytest.raises(PlanInfeasibleError) as caught:
        make_tiered_plan(PAGED, machine(), LONG, minimum - 1, 1 << 34, kv=kv)
    assert caught.value.minimum_ram_nbytes == minimum
    assert make_tiered_plan(SMALL, machine(), WORK, 1 << 34, 1 << 34, kv=kv).kv is None, "none of its layers is paged"


def test_the_newest_blocks_lie_in_vram_where_there_is_room() -> None:
    below = make_tiered_plan(PAGED, machine(), LONG, 1 << 34, 1 << 34, kv=KvChoice("int8"))
    plan = make_tiered_plan(PAGED, machine(), LONG, 1 << 34, 1 << 34, kv=KvChoice("int8", vram_nbytes=None))
    assert plan.kv is not None and plan.vram is not None and plan.prediction is not None
    assert below.kv is not None and below.vram is not None and below.prediction is not None
    assert (plan.kv.vram_tokens, plan.kv.format, plan.vram.kv_layers) == (LONG.context_tokens, "int8", ())
    assert plan.vram.use.kv_nbytes == plan.kv.vram_nbytes >= LONG.context_tokens * plan.kv.nbytes_per_token
    assert plan.vram.use.activation_nbytes == below.vram.use.activation_nbytes
    assert plan.ram.kv_nbytes < below.ram.kv_nbytes
    one, other = plan.prediction.decode, below.prediction.decode
    assert one.terms.attention_s < other.terms.attention_s
    rest_s = [value.terms.total_s - value.terms.attention_s for value in (one, other)]
    assert rest_s[0] == pytest.approx(rest_s[1])
    assert one.gpu_busy_s > other.gpu_busy_s and one.cpu_busy_s < other.cpu_busy_s
    assert plan.prediction.prefill.terms.attention_s == below.prediction.prefill.terms.attention_s


def test_blocks_in_vram_are_as_many_as_the_runtime_puts_there() -> None:
    """There is room for a part of the cache only."""
    work = replace(LONG, context_tokens=1 << 20, prompt_tokens=1 << 19, prefill_chunk_tokens=256)
    kv = KvChoice("int8", vram_nbytes=None)
    plan = make_tiered_plan(PAGED, machine(), work, 1 << 34, 1 << 30, kv=kv)
    assert plan.kv is not None and plan.vram is not None and plan.prediction is not None
    assert 0 < plan.kv.vram_tokens < work.context_tokens
    beside = vram_beside_weights(PAGED, work) + PIECES_NBYTES
    run = with_vram(
        PAGED, make_plan(PAGED, work, 1 << 34, kv=kv), 1 << 30, runs_attention=True, other_nbytes=beside,
        kv_vram_nbytes=None,
    )  # fmt: skip
    assert run.kv is not None
    # The runtime has the embedding there too.
    less = PAGED.dense_nbytes - sum(layer.dense_nbytes for layer in PAGED.layers) + largest_block_nbytes(PAGED, "int8")
    assert 0 <= plan.kv.vram_nbytes - run.kv.vram_nbytes <= less
    assert 0 <= plan.kv.vram_tokens - run.kv.vram_tokens <= less // plan.kv.nbytes_per_token + 256


@pytest.mark.parametrize("nbytes", [1 << 24, 1 << 25])
def test_blocks_take_what_was_asked_for(nbytes: int) -> None:
    plan = make_tiered_plan(PAGED, machine(), LONG, 1 << 34, 1 << 34, kv=KvChoice("bf16", vram_nbytes=nbytes))
    assert plan.kv is not None and plan.vram is not None
    block = largest_block_nbytes(PAGED, "bf16")
    assert nbytes - block < plan.vram.use.kv_nbytes == plan.kv.vram_nbytes <= nbytes
    assert plan.kv.vram_tokens > 0
    with pytest.raises(PlanInfeasibleError, match="leaves no room"):
        make_tiered_plan(PAGED, machine(), LONG, 1 << 34, nbytes, kv=KvChoice("bf16", vram_nbytes=nbytes))


def test_decode_attends_on_both_devices_at_once() -> None:
    """The time of attention is that of the slower of both, worked out by hand."""
    kv = KvChoice("bf16", vram_nbytes=1 << 24)
    plan = make_tiered_plan(PAGED, machine(), LONG, 1 << 34, 1 << 34, kv=kv)
    assert plan.kv is not None and plan.prediction is not None
    layer, work, gpu = in_blocks(PAGED, plan.kv).layers[0], decode_pass(LONG), machine().gpu
    assert gpu is not None
    there = replace(work, cached_tokens=float(plan.kv.vram_tokens))
    others = replace(work, cached_tokens=work.cached_tokens - plan.kv.vram_tokens)
    slower = max(attention_s(layer, gpu, there), attention_s(layer, machine().cpu, others))
    assert plan.prediction.decode.terms.attention_s == pytest.approx(3 * slower)


@given(st.integers(28, 34), st.integers(28, 34), st.integers(1, 1 << 30), st.booleans())
@settings(max_examples=20, deadline=None)
def test_more_memory_for_blocks_is_never_slower(ram: int, vram: int, more: int, in_ram: bool) -> None:
    kv = KvChoice("int8", vram_nbytes=None)
    try:
        plan = make_tiered_plan(PAGED, machine(), LONG, 1 << ram, 1 << vram, kv=kv)
    except PlanInfeasibleError:
        return
    budgets = ((1 << ram) + more, 1 << vram) if in_ram else (1 << ram, (1 << vram) + more)
    assert plan.vram is None or plan.vram.use.total_nbytes <= 1 << vram
    assert plan.peak_ram_nbytes <= 1 << ram
    assert request_s(make_tiered_plan(PAGED, machine(), LONG, *budgets, kv=kv)) <= request_s(plan) * (1 + 1e-9)


def test_a_cache_that_fits_nowhere_whole_lies_in_blocks_and_on_disk() -> None:
    work = replace(LONG, context_tokens=1 << 20, prompt_tokens=1 << 19, prefill_chunk_tokens=256)
    vram, ram = 1 << 30, 1 << 31
    plan = make_tiered_plan(PAGED, machine(), work, ram, vram)
    assert plan.kv is not None and plan.vram is not None and plan.prediction is not None
    assert plan.kv.format == "bf16" and not plan.kv.lossy
    assert plan.kv.disk_nbytes > 0
    assert plan.prediction.decode.terms.disk_s > 0
    assert plan.vram.use.total_nbytes <= vram
    assert plan.peak_ram_nbytes <= ram
    more = make_tiered_plan(PAGED, machine(), work, 1 << 34, vram)
    assert request_s(more) <= request_s(plan)
