"""Predictions by terms: against adding up by hand, and in the directions that they must go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from placement.hardware_profile import HardwareProfile
from placement.homes import Homes
from placement.model_spec import LinearSpec
from placement.plan import VramPlan, VramUse
from placement.planner import nothing_in_vram, predicted
from placement.predict import Routing, expected_s, predict
from placement.routing import FloatArray, Popularity
from placement.workload import Workload
from tests.placement.machines import machine, model
from tests.placement.specs import spec

SPEC = model(layers=4, experts=16, top_k=4, dense_layers=1)
WORK = Workload(4096, prompt_tokens=300, new_tokens=20, prefill_chunk_tokens=128)
CPU = machine(gpu=False)


def in_ram(slots: int) -> Homes:
    return Homes((), (), False, 0, slots, 4 << 20, 4)


ALL = in_ram(SPEC.expert_count)


def test_decode_with_all_in_ram_adds_up() -> None:
    terms = predict(SPEC, CPU, ALL, WORK).decode.terms
    curve, overheads = CPU.cpu.linear("bf16"), CPU.cpu.overheads
    linears = [*SPEC.layers[0].linears] * 4 + [LinearSpec(1000, 256, "bf16")]
    assert terms.dense_s == pytest.approx(sum(curve.seconds(one.weights, 1, one.count) for one in linears))
    expert = 3 * 256 * 128
    assert terms.cpu_experts_s == pytest.approx(3 * CPU.cpu.expert("bf16").seconds(4 * expert, 1))
    assert terms.overhead_s == pytest.approx(overheads.pass_s + 4 * overheads.layer_s + 4 * 256 * overheads.element_s)
    cached = 300 + 10 + 1
    assert terms.attention_s == pytest.approx(4 * (1e-5 + cached * 1024 / 20e9))
    assert (terms.disk_s, terms.link_s, terms.gpu_experts_s) == (0, 0, 0)
    assert terms.total_s == pytest.approx(sum(terms.as_dict().values()))


@pytest.mark.parametrize(("layers", "pass_s"), [((), 1e-3), ((1,), 7e-4), ((0, 1, 2, 3), 7e-4)])
def test_the_overhead_of_a_pass_is_that_of_the_device_with_dense_layers(layers: tuple[int, ...], pass_s: float) -> None:
    both = machine()
    assert both.gpu is not None
    # Layers cost nothing, so that the pass is left.
    none = replace(both.gpu.overheads, layer_s=0.0, element_s=0.0)
    profile = replace(
        both,
        cpu=replace(both.cpu, overheads=replace(none, pass_s=1e-3)),
        gpu=replace(both.gpu, overheads=replace(none, pass_s=7e-4)),
    )
    homes = replace(ALL, dense_in_vram=layers, vram_slots=4)
    assert predict(SPEC, profile, homes, WORK).decode.terms.overhead_s == pytest.approx(pass_s)


def test_prefill_is_the_sum_of_its_chunks() -> None:
    prefill = predict(SPEC, CPU, ALL, WORK).prefill
    assert prefill.tokens == 300
    parts = [predict(SPEC, CPU, ALL, replace(WORK, prompt_tokens=tokens)).prefill.seconds for tokens in (128, 256)]
    # The second chunk differs from the first by attention alone.
    assert parts[0] < parts[1] - parts[0] < 1.5 * parts[0]
    assert prefill.seconds > parts[1]


def test_a_prompt_beyond_the_context_is_cut() -> None:
    work = replace(WORK, context_tokens=100)
    assert predict(SPEC, CPU, ALL, work).prefill.tokens == 100


@pytest.mark.parametrize("batch", [1, 4])
def test_the_range_holds_what_is_expected(batch: int) -> None:
    for slots in (2, 20, SPEC.expert_count):
        found = predict(SPEC, CPU, in_ram(slots), replace(WORK, batch=batch))
        for one in (found.decode, found.prefill):
            slow, fast = one.tokens_per_s_range
            assert slow < one.tokens_per_s < fast
            assert one.binds == max(one.terms.as_dict(), key=one.terms.as_dict().__getitem__)
    assert found.decode.tokens == batch


def test_datasheets_are_less_certain_than_measurements() -> None:
    sheet = replace(CPU, provenance=replace(CPU.provenance, kind="datasheet"))
    measured, assumed = (predict(SPEC, one, ALL, WORK).decode for one in (CPU, sheet))
    assert measured.seconds == assumed.seconds
    assert assumed.high_s / assumed.low_s > measured.high_s / measured.low_s


def test_a_trace_takes_the_place_of_the_popularity() -> None:
    class Half:
        def rate(self, slots: FloatArray) -> FloatArray:
            return np.where(slots > 0, 0.5, 0.0)

    routing = Routing(Popularity(), Half(), "recorded")
    found = predict(SPEC, CPU, in_ram(2), WORK, routing)
    assert (found.decode.ram_hit_rate, found.routing) == (0.5, "recorded")
    assert found.decode.read_nbytes == pytest.approx(0.5 * 3 * 4 * SPEC.bundle_nbytes)
    assert found.prefill.ram_hit_rate < 0.5, "passes of many tokens are not what was recorded"


def slower(**speeds: float) -> HardwareProfile:
    return machine(gpu=False, **speeds)


def test_it_goes_the_right_way() -> None:
    base = expected_s(SPEC, CPU, in_ram(20), WORK)
    assert expected_s(SPEC, CPU, in_ram(30), WORK) < base
    assert expected_s(SPEC, slower(disk=1e9), in_ram(20), WORK) > base
    assert expected_s(SPEC, slower(ram=1e10), in_ram(20), WORK) > base
    assert expected_s(SPEC, slower(cpu_flops=1e10), in_ram(20), WORK) > base
    assert expected_s(SPEC, CPU, in_ram(20), WORK, Routing.stated(1.0)) < base
    longer = predict(SPEC, CPU, ALL, replace(WORK, prompt_tokens=3000)).decode
    assert longer.terms.attention_s > predict(SPEC, CPU, ALL, WORK).decode.terms.attention_s


def test_attention_takes_longer_between_reads() -> None:
    assert CPU.disk is not None
    disturbed = replace(CPU, disk=replace(CPU.disk, between=0.5))
    work = replace(WORK, prompt_tokens=3000)

    def more_s(cached_tokens: int) -> float:
        at = replace(work, prompt_tokens=cached_tokens)
        slow, fast = (predict(SPEC, profile, in_ram(2), at).decode for profile in (disturbed, CPU))
        assert slow.terms.cpu_experts_s == fast.terms.cpu_experts_s, "it is the layer around that takes longer"
        more = slow.terms.attention_s - fast.terms.attention_s + slow.terms.dense_s - fast.terms.dense_s
        assert slow.seconds - fast.seconds == pytest.approx(more)
        return more

    short, long = (predict(SPEC, CPU, ALL, replace(work, prompt_tokens=n)).decode for n in (100, 3000))
    # Three of four layers have experts, of which some are all but always read.
    longer_s = 3 / 4 * (long.terms.attention_s - short.terms.attention_s)
    assert more_s(3000) - more_s(100) == pytest.approx(longer_s, rel=0.01)
    assert predict(SPEC, disturbed, in_ram(2), work).prefill == predict(SPEC, CPU, in_ram(2), work).prefill
    assert predict(SPEC, disturbed, ALL, work).decode == predict(SPEC, CPU, ALL, work).decode


def test_narrow_heads_have_more_scores_for_their_products() -> None:
    attention = replace(CPU.cpu.attention, few_score_s=1e-9, score_s=1e-10)
    cpu = replace(CPU, cpu=replace(CPU.cpu, attention=attention))
    heads = replace(SPEC, layers=tuple(replace(layer, attention_heads=8) for layer in SPEC.layers))
    one, plain = (predict(of, cpu, ALL, replace(WORK, prompt_tokens=100)).prefill for of in (heads, SPEC))
    more_s = one.terms.attention_s - plain.terms.attention_s
    assert more_s == pytest.approx(4 * 8 * sum(range(1, 101)) * 1e-10)


def test_a_window_bounds_attention() -> None:
    layers = tuple(replace(layer, window_tokens=64) for layer in SPEC.layers)
    windowed = replace(SPEC, layers=layers)
    short, long = (
        predict(windowed, CPU, ALL, replace(WORK, prompt_tokens=tokens)).decode.terms.attention_s
        for tokens in (100, 3000)
    )
    assert short == long


def test_nothing_on_the_accelerator_is_as_without_one() -> None:
    assert predict(SPEC, machine(), ALL, WORK).decode == predict(SPEC, CPU, ALL, WORK).decode


def test_all_on_the_accelerator_leaves_the_cpu_idle() -> None:
    layers = tuple(range(4))
    homes = Homes(layers, layers, True, SPEC.expert_count, 2, 4 << 20, 4)
    decode = predict(SPEC, machine(), homes, WORK).decode
    assert decode.vram_hit_rate == pytest.approx(1)
    assert decode.terms.cpu_experts_s == decode.terms.link_s == decode.terms.disk_s == 0
    # The pass's own overhead is Python's, and on no device.
    assert decode.cpu_busy_s == pytest.approx(0)
    assert decode.gpu_busy_s > 0


def test_a_plan_over_vram_is_predicted_where_it_lies() -> None:
    layers = tuple(range(4))
    vram = VramPlan(layers, (), True, 5, VramUse(0, 0, 0, 0), 0)
    homes = replace(nothing_in_vram(SPEC, 7), dense_in_vram=layers, head_in_vram=True, vram_slots=5)
    assert predicted(SPEC, machine(), 7, WORK, vram=vram) == predict(SPEC, machine(), homes, WORK)
    assert predicted(SPEC, machine(), 7, WORK) == predict(SPEC, CPU, replace(homes, vram_slots=0, dense_in_vram=(),
        head_in_vram=False), WORK)  # fmt: skip
    with pytest.raises(ValueError, match="a profile of the accelerator"):
        predicted(SPEC, CPU, 7, WORK, vram=vram)
    streaming = replace(vram, dense_layers=(1, 3), window_layers=2)
    streamed = replace(homes, dense_streamed=(0, 2))
    assert predicted(SPEC, machine(), 7, WORK, vram=streaming) == predict(SPEC, machine(), streamed, WORK)


def test_cache_in_ram_makes_queries_cross() -> None:
    layers = tuple(range(4))
    there, here = (
        predict(SPEC, machine(), Homes(layers, kv, True, SPEC.expert_count, 2, 4 << 20, 4), WORK).decode
        for kv in (layers, ())
    )
    assert here.terms.link_s > 0 == there.terms.link_s
    assert here.terms.attention_s > there.terms.attention_s


def test_sizes_alone_predict_nothing() -> None:
    with pytest.raises(ValueError, match="sizes only"):
        predict(spec(), CPU, in_ram(2), WORK)


def test_homes_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="together with its dense"):
        Homes((0,), (1,), False, 0, 2, 4 << 20, 4)
    with pytest.raises(ValueError, match="negative"):
        Homes((), (), False, -1, 2, 4 << 20, 4)
