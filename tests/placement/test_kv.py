"""KV caches in blocks: when they take over, what they take, and what they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from formats.kv import KvLayout
from placement.hardware_profile import BlockSpeed
from placement.kv import KvChoice, KvShape, minimum_nbytes, token_nbytes
from placement.kv_cost import attended_share, cold_nbytes, in_blocks, with_reads
from placement.kv_sparsity import KvSparsity
from placement.passes import Pass
from placement.plan import Plan
from placement.planner import PlanInfeasibleError, make_plan
from placement.workload import Workload
from tests.placement.machines import machine, model

SHAPE = KvShape(8, 128, 128)
SPEC = model(layers=4, kv_nbytes_per_token=4 * 4096, kv_shapes=(SHAPE,) * 4)
LONG = Workload(131072, prompt_tokens=100_000)


def _least(workload: Workload, kv: KvChoice) -> int:
    with pytest.raises(PlanInfeasibleError) as caught:
        make_plan(SPEC, workload, 0, kv=kv)
    return caught.value.minimum_ram_nbytes


def test_a_cache_that_fits_grows_in_place() -> None:
    assert make_plan(SPEC, Workload(1000), 1 << 34).kv is None
    assert make_plan(SPEC, Workload(1000), 1 << 34, kv=KvChoice("bf16", 1 << 30)).kv is None


@pytest.mark.parametrize("format", ["auto", "fp8", "int8", "int4", "fp32"])
def test_the_least_budget_is_the_least(format: str) -> None:
    choice = KvChoice(format)
    least = _least(LONG, choice)
    plan = make_plan(SPEC, LONG, least, kv=choice)
    assert plan.kv is not None and plan.kv.spills_at_tokens is not None
    assert plan.ram.total_nbytes <= least and plan.ram_slots >= 2
    with pytest.raises(PlanInfeasibleError):
        make_plan(SPEC, LONG, least - 1, kv=choice)


def test_what_does_not_fit_is_split_over_ram_and_disk() -> None:
    fitting = make_plan(SPEC, LONG, 1 << 40)
    assert fitting.kv is None
    plan = make_plan(SPEC, LONG, fitting.minimum_ram_nbytes // 2)
    assert plan.kv is not None and not plan.kv.lossy and plan.kv.recent_tokens == 0
    spills, each = plan.kv.spills_at_tokens, plan.kv.nbytes_per_token
    assert spills is not None and 0 < spills < LONG.context_tokens
    assert plan.kv.disk_nbytes == each * (LONG.context_tokens - spills)
    assert plan.kv.ram_nbytes >= each * spills
    assert plan.kv.cold_tokens(spills) == 0 and plan.kv.cold_tokens(spills + 5) == 5


def test_a_bound_on_the_cache_leaves_the_rest_to_experts() -> None:
    small, large = (make_plan(SPEC, LONG, 1 << 31, kv=KvChoice("int8", ram)) for ram in (1 << 28, 1 << 29))
    assert small.kv is not None and large.kv is not None
    assert small.kv.ram_nbytes == 1 << 28 < large.kv.ram_nbytes
    assert small.kv.lossy and small.kv.recent_tokens == 128
    assert small.kv.disk_nbytes > large.kv.disk_nbytes
    assert Plan.from_json(small.to_json()) == small


def test_bytes_of_a_token_are_the_layouts() -> None:
    for format in ("bf16", "fp8_e4m3", "int8", "int4"):
        layout = KvLayout(format, 8, 128, 128)
        assert token_nbytes(SPEC, format) == 4 * layout.nbytes // 64
    latent = model(layers=1, kv_shapes=(KvShape(1, 576, 0, 512),))
    assert token_nbytes(latent, "int8") == KvLayout("int8", 1, 576, 0, value_from_key=512).nbytes // 64


def test_layers_that_are_not_paged_count_as_they_are() -> None:
    mixed = replace(SPEC, kv_shapes=(SHAPE, None, SHAPE, None))
    assert minimum_nbytes(mixed, 1, "int8") < minimum_nbytes(SPEC, 1, "int8")
    plans = [make_plan(one, LONG, 1 << 32, kv=KvChoice("int8", 1 << 26)) for one in (SPEC, mixed)]
    # Two layers of 4096 bytes a token stay in RAM as they are.
    assert plans[1].ram.kv_nbytes - plans[0].ram.kv_nbytes >= 2 * 4096 * LONG.context_tokens
    none = replace(SPEC, kv_shapes=(None,) * 4)
    assert make_plan(none, Workload(1000), 1 << 34, kv=KvChoice("int8")).kv is None


def test_blocks_on_disk_cost_their_reads() -> None:
    profile = machine(gpu=False)
    cold, warm = (make_plan(SPEC, LONG, 1 << 33, profile, kv=KvChoice("int8", ram)) for ram in (1 << 27, 1 << 31))
    assert cold.kv is not None and warm.kv is not None and warm.kv.spills_at_tokens is None
    assert cold.prediction is not None and warm.prediction is not None
    work = Pass(1, 1, 100_063)
    nbytes = cold_nbytes(cold.kv, work)
    assert nbytes == cold.kv.nbytes_per_token * cold.kv.cold_tokens(100_064)
    reads = cold.prediction.decode.read_nbytes - warm.prediction.decode.read_nbytes
    assert reads == pytest.approx(cold_nbytes(cold.kv, Pass(1, 1, LONG.cached_tokens)), rel=0.01)
    assert cold.prediction.decode.terms.disk_s > warm.prediction.decode.terms.disk_s
    assert cold.prediction.decode.low_s < cold.prediction.decode.seconds < cold.prediction.decode.high_s


def test_attention_reads_the_formats_bytes() -> None:
    plan = make_plan(SPEC, LONG, 1 << 32, kv=KvChoice("int4", 1 << 30))
    assert plan.kv is not None
    found = in_blocks(SPEC, plan.kv)
    assert sum(layer.kv_nbytes_per_token for layer in found.layers) == pytest.approx(plan.kv.nbytes_per_token, abs=4)
    assert in_blocks(SPEC, None) is SPEC


def test_attention_to_blocks_takes_what_was_measured_of_their_format() -> None:
    profile = machine(gpu=False)
    speeds = tuple(BlockSpeed(format, 1e-5, 1e12, flops) for format, flops in (("int8", 2e11), ("int4", 1e11)))
    measured = replace(profile, cpu=replace(profile.cpu, blocks=speeds))
    for format, flops in ("int8", 2e11), ("int4", 1e11), ("fp8", 0.0):
        one, plain = (
            make_plan(SPEC, LONG, 1 << 40, profile, kv=KvChoice(format)).prediction for profile in (measured, profile)
        )
        assert one is not None and plain is not None
        assert one.prefill == plain.prefill
        if not flops:
            assert one.decode == plain.decode
            continue
        values = sum(layer.attention_values for layer in SPEC.layers)
        expected = len(SPEC.layers) * 1e-5 + 2 * values * (LONG.cached_tokens + 1) / flops
        assert one.decode.terms.attention_s == pytest.approx(expected)


def test_reads_of_blocks_and_attention_share_the_processor() -> None:
    cold = {}
    for reading in (0.1, 1.0):
        profile = machine(gpu=False, reading=reading)
        found = [
            make_plan(SPEC, LONG, 1 << 34, profile, kv=KvChoice("int8", ram)).prediction for ram in (1 << 28, None)
        ]
        assert found[0] is not None and found[1] is not None
        cold[reading] = found[0].decode
        assert found[0].decode.terms.disk_s > found[1].decode.terms.disk_s
    both = (one.terms.attention_s + one.terms.disk_s for one in cold.values())
    # Where kernels have a tenth of their speed beside reads that have 0.9, nothing is gained by doing both at once.
    slow, fast = both
    assert slow > 1.05 * fast
    assert slow == pytest.approx(cold[0.1].terms.attention_s + cold[0.1].disk_busy_s, rel=0.02)


@pytest.mark.parametrize("method", ["top-k", "snapkv", "h2o"])
def test_attention_to_a_part_is_faster_and_reads_less(method: str) -> None:
    profile = machine(gpu=False)
    whole, part = (
        make_plan(SPEC, LONG, 1 << 33, profile, kv=KvChoice("int8", 1 << 27, sparsity=sparsity))
        for sparsity in (None, KvSparsity(method, 0.05))
    )
    assert part.kv is not None and whole.prediction is not None and part.prediction is not None
    before, after = whole.prediction.decode, part.prediction.decode
    share = after.terms.attention_s / before.terms.attention_s
    assert share == pytest.approx(attended_share(SPEC, LONG, part.kv), rel=0.01)
    # Besides a twentieth: new tokens, and of top-k landmarks, a fifth of a byte where keys and values take 2.06.
    assert 0.05 < share < (0.05 + 1 / 10 + 0.01 if method == "top-k" else 0.06)
    assert after.terms.total_s < before.terms.total_s and after.low_s < after.seconds < after.high_s
    assert after.read_nbytes < before.read_nbytes
    assert part.prediction.prefill.terms.attention_s == whole.prediction.prefill.terms.attention_s


def test_each_layers_reads_of_blocks_begin_anew() -> None:
    profile = machine(gpu=False, disk=1e12)
    assert profile.disk is not None and not profile.disk.bursts
    late = replace(profile, disk=replace(profile.disk, latency_s=0.5))
    kv = KvChoice("int8", 1 << 28)
    soon, after = (make_plan(SPEC, LONG, 1 << 34, one, kv=kv) for one in (profile, late))
    assert soon.prediction is not None and after.prediction is not None and soon.kv is not None
    more = after.prediction.decode.disk_busy_s - soon.prediction.decode.disk_busy_s
    assert more == pytest.approx(len(SPEC.layers) * 0.5, rel=0.01)
    # With a short context nothing has left memory.
    short = replace(LONG, prompt_tokens=10, new_tokens=10)
    decode = [with_reads(soon.prediction, SPEC, one, short, soon.kv).decode for one in (profile, late)]
    assert decode[0] == decode[1] == soon.prediction.decode
