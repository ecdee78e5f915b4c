"""Profiles come back from JSON; disks and links between their measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from formats.bundle import EXPERT_FORMATS, BundleLayout
from placement.datasheets import CPUS, DRIVES, GPUS, LINKS, bits_of, datasheet
from placement.hardware_profile import Disk, DiskPoint, HardwareProfile, Link
from tests.placement.machines import machine, machines

DISK = Disk(
    (DiskPoint(1 << 16, 1, 1e8), DiskPoint(1 << 20, 1, 5e8), DiskPoint(1 << 16, 4, 4e8), DiskPoint(1 << 20, 4, 2e9)),
    1e-4,
    0.5,
    0,
)


@settings(deadline=None)
@given(machines)
def test_a_profile_comes_back(profile: HardwareProfile) -> None:
    assert HardwareProfile.from_json(profile.to_json()) == profile


@pytest.mark.parametrize(
    ("block", "depth", "expected"),
    [
        (1 << 16, 1, 1e8),
        (1 << 12, 1, 1e8),
        (1 << 18, 1, 3e8),
        (1 << 24, 4, 2e9),
        (1 << 20, 3, 2e9),
        (1 << 20, 64, 2e9),
        (1 << 20, 0, 5e8),
    ],
)
def test_a_disk_between_its_points(block: int, depth: int, expected: float) -> None:
    assert DISK.bytes_per_s(block, depth) == pytest.approx(expected)
    assert DISK.overlapped_bytes_per_s(block, depth) == pytest.approx(expected / 2)


@pytest.mark.parametrize(("points", "share"), [((), 1.0), (DISK.points, 0.0), (DISK.points, 1.5)])
def test_what_is_no_disk_is_refused(points: tuple[DiskPoint, ...], share: float) -> None:
    with pytest.raises(ValueError):
        Disk(points, 1e-4, share, 0)


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


def test_memory_at_another_speed_scales_what_waits_for_it() -> None:
    profile = machine(ram=20e9)
    slower = profile.with_memory_speed(10e9)
    assert slower.cpu.memory_bytes_per_s == 10e9
    before, after = (one.cpu.expert("bf16").seconds_per_weight(1) for one in (profile, slower))
    assert after == pytest.approx(2 * before)
    assert slower.gpu == profile.gpu


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
