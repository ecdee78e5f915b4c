"""Profiles come back from JSON; disks and links between their measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from formats.bundle import EXPERT_FORMATS, BundleLayout
from placement.curves import SmallProducts
from placement.datasheets import CPUS, DRIVES, GPUS, LINKS, bits_of, datasheet
from placement.hardware_profile import AttentionSpeed, BlockSpeed, HardwareProfile, Link, Speeds
from tests.placement.machines import machine, machines


@settings(deadline=None)
@given(machines)
def test_a_profile_comes_back(profile: HardwareProfile) -> None:
    assert HardwareProfile.from_json(profile.to_json()) == profile


def test_a_link_has_latency_and_bandwidth() -> None:
    assert Link(1e-5, 1e9, 5e8).seconds(5e6, copies=2) == pytest.approx(2e-5 + 1e-2)


def test_an_accelerator_comes_with_its_links() -> None:
    profile = machine()
    with pytest.raises(ValueError, match="both links"):
        replace(profile, to_gpu=None)
    assert profile.without_gpu() == replace(profile, gpu=None, to_gpu=None, from_gpu=None)


def test_a_format_without_a_curve_is_named() -> None:
    with pytest.raises(ValueError, match="'mxfp4'"):
        machine().cpu.expert("mxfp4")


def test_parts_at_other_speeds_scale_what_waits_for_them() -> None:
    profile = machine(ram=20e9, cpu_flops=1e11)
    slower = profile.with_speeds(Speeds(memory=0.5, arithmetic=0.8, disk=0.25))
    assert slower.cpu.memory_bytes_per_s == 10e9
    for tokens, factor in ((1, 0.5), (512, 0.8)):
        before, after = (one.cpu.linear("bf16").seconds_per_weight(tokens) for one in (profile, slower))
        assert after == pytest.approx(before / factor)
    assert slower.cpu.overheads.pass_s == pytest.approx(profile.cpu.overheads.pass_s / 0.8)
    assert slower.disk is not None and profile.disk is not None
    assert slower.disk.bytes_per_s(1 << 20, 4) == pytest.approx(profile.disk.bytes_per_s(1 << 20, 4) / 4)
    assert slower.gpu == profile.gpu


def test_kinds_of_work_that_a_probe_tells_apart() -> None:
    """Each goes at its own speed; what was not told apart as experts do, or as what computes does."""
    profile = machine(gpu=False, step=1e-4)
    overheads = replace(
        profile.cpu.overheads, prompt_layer_s=1e-3, step_arrival_s=2e-5, arrival_s=3e-5, grouped_output_s=4e-10
    )
    attention = replace(profile.cpu.attention, prompt_call_s=1e-4, score_s=1e-10)
    cpu = replace(profile.cpu, overheads=overheads, packed_overheads=overheads, attention=attention)
    speeds = Speeds(
        memory=0.5, arithmetic=0.8, between=0.7, linear_memory=1.5, linear_between=1.25, linear_arithmetic=1.1,
        attention=0.4, steps=2.0, prompts=0.25,
    )  # fmt: skip
    found = cpu.with_speeds(speeds)
    assert found.expert("int4") == cpu.expert("int4").with_speeds(0.5, 0.8, 0.7)
    assert found.linear("int4") == cpu.linear("int4").with_speeds(1.5, 1.1, 1.25)
    assert found.attention.seconds(0, 1e8, 64, 1e6) == pytest.approx(attention.seconds(0, 1e8, 64, 1e6) / 0.4)
    assert found.attention.seconds(0, 1e8, 1, 1e6) == pytest.approx(attention.seconds(0, 1e8, 1, 1e6) / 0.8)
    for one in (found.overheads, found.packed_overheads):
        assert one is not None
        assert (one.pass_s, one.layer_s, one.step_s, one.step_arrival_s) == pytest.approx(
            (overheads.pass_s / 2, overheads.layer_s / 2, 5e-5, 1e-5)
        )
        assert (one.prompt_layer_s, one.element_s, one.arrival_s) == pytest.approx((4e-3, 4e-11, 1.2e-4))
        assert one.grouped_output_s == pytest.approx(5e-10)
    plain = cpu.with_speeds(Speeds(0.5, 0.8, between=0.7))
    assert plain.linear("int4") == cpu.linear("int4").with_speeds(0.5, 0.8, 0.7)
    assert plain.attention.flops_per_s == pytest.approx(0.8 * attention.flops_per_s)
    assert (plain.overheads.pass_s, plain.overheads.prompt_layer_s) == pytest.approx((overheads.pass_s / 0.8, 1.25e-3))


def test_the_median_of_speeds_is_of_each_where_it_was_found() -> None:
    found = [Speeds(1.0, 2.0, 3.0, None, 0.5), Speeds(3.0, 1.0, 1.0, None, 0.7), Speeds(2.0, 4.0, 2.0)]
    assert Speeds.median_of(found) == Speeds(2.0, 2.0, 2.0, None, pytest.approx(0.6))  # type: ignore[arg-type]
    small = [Speeds(small_experts=SmallProducts(1.0, 9.0, few, 1.0)) for few in (0.5, 2.0, 0.75)]
    assert Speeds.median_of(small).small_experts == SmallProducts(1.0, 9.0, 0.75, 1.0)


def test_blocks_are_read_or_multiplied() -> None:
    speed = BlockSpeed("int8", 1e-5, 1e10, 1e11)
    assert speed.seconds(1e8, 1e8) == pytest.approx(1e-5 + 1e-2)
    assert speed.seconds(1e6, 1e10) == pytest.approx(1e-5 + 1e-1)
    assert speed.with_speeds(0.5, 0.25) == BlockSpeed("int8", 4e-5, 5e9, 2.5e10)
    profile = machine()
    with_blocks = replace(profile, cpu=replace(profile.cpu, blocks=(speed,)))
    assert with_blocks.with_speeds(Speeds(0.5, 0.25)).cpu.blocks == (speed.with_speeds(0.5, 0.25),)
    assert HardwareProfile.from_json(with_blocks.to_json()) == with_blocks
    assert with_blocks.cpu.decode_attention_s(1e8, 1e8, "int8") == speed.seconds(1e8, 1e8)
    for format in None, "int4":
        assert with_blocks.cpu.decode_attention_s(1e8, 1e8, format) == profile.cpu.attention.seconds(1e8, 1e8, 1)


@pytest.mark.parametrize(("new", "score_s"), [(1, 1e-9), (64, 1e-10)])
def test_scores_take_more_than_their_products(new: int, score_s: float) -> None:
    speed = AttentionSpeed(1e-5, 1e10, 1e10, 1e11, 1e-3, 1e-9, 1e-10)
    plain = replace(speed, few_score_s=0.0, score_s=0.0)
    more_s = speed.seconds(1e3, 1e8, new, 1e6) - plain.seconds(1e3, 1e8, new, 1e6)
    assert more_s == pytest.approx(1e6 * score_s)
    assert speed.seconds(1e9, 1e6, new, 1e3) == plain.seconds(1e9, 1e6, new), "reading takes longer"
    slower = speed.with_speeds(1.0, 0.5, 0.5)
    assert slower.seconds(1e3, 1e8, new, 1e6) == pytest.approx(2 * speed.seconds(1e3, 1e8, new, 1e6))
    block = BlockSpeed("int8", 1e-5, 1e10, 1e11, 1e-10)
    assert block.seconds(1e3, 1e8, 1e6) == pytest.approx(1e-5 + 1e-3 + 1e-4)
    assert block.with_speeds(1.0, 0.5).score_s == 2e-10


@settings(deadline=None)
@given(machines)
def test_at_the_same_speeds_it_is_the_same(profile: HardwareProfile) -> None:
    assert profile.with_speeds(Speeds()) == profile


@pytest.mark.parametrize("gpu", [None, *GPUS])
@pytest.mark.parametrize("drive", DRIVES)
def test_datasheets_make_profiles(gpu: str | None, drive: str) -> None:
    for cpu in CPUS:
        profile = datasheet(gpu=gpu, cpu=cpu, drive=drive)
        assert profile.provenance.kind == "datasheet"
        assert (profile.gpu is None) == (gpu is None)
        assert {curve.format for curve in profile.cpu.experts} == set(EXPERT_FORMATS)
        assert profile.disk is not None
        assert profile.disk.bytes_per_s(4 << 20, 4) <= DRIVES[drive]
        if profile.to_gpu is not None and gpu is not None:
            assert profile.to_gpu.overlapped_bytes_per_s < profile.to_gpu.bytes_per_s < LINKS[GPUS[gpu].link]


@pytest.mark.parametrize(
    "wrong", [{"gpu": "x"}, {"cpu": "x"}, {"drive": "x"}, {"gpu": "rtx4090", "link": "x"}], ids=str
)
def test_an_unknown_part_is_named(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"unknown .* 'x'; known"):
        datasheet(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", EXPERT_FORMATS)
def test_bits_are_those_of_the_layout(format: str) -> None:
    layout = BundleLayout(2048, 1024, format)
    assert layout.payload_nbytes * 8 / (3 * 2048 * 1024) == pytest.approx(bits_of(format), rel=1e-3)
