"""One MoE layer, against playing it out event by event and against trying every split."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.bundle import BundleLayout
from placement.expert_cost import expert_cost, expert_entries, expert_weights, grouping_s, longer_after_reads
from placement.hardware_profile import FormatCurve, HardwareProfile
from placement.homes import Homes
from placement.model_spec import ExpertsSpec
from placement.outputs import GROUP_NBYTES, groups_of
from placement.routing import LayerDemand
from tests.placement.machines import machine, machines

HOMES = Homes((), (), False, 0, 2, 4 << 20, 4)
EXPERTS = ExpertsSpec("experts", 64, 8, BundleLayout(1024, 512, "bf16"))
DECODE = LayerDemand(8.0, 8.0)


def total(profile: HardwareProfile, need: LayerDemand, vram: float, ram: float, rows: int = 1) -> float:
    rates = np.array([vram]), np.array([ram])
    return float(expert_cost(EXPERTS, profile, HOMES, need, rows, *rates, on_gpu=True).total_s[0])


def test_all_in_ram_is_one_call_of_the_cpu() -> None:
    profile = machine(gpu=False)
    curve = profile.cpu.expert("bf16")
    assert total(profile, DECODE, 0.0, 1.0) == pytest.approx(curve.seconds(8 * expert_weights(EXPERTS), 1))


def test_what_experts_round_counts_where_the_curve_tells_it_apart() -> None:
    plain = machine(gpu=False)
    curve = replace(plain.cpu.expert("bf16"), entry_s=1e-9)
    profile = replace(plain, cpu=replace(plain.cpu, experts=(FormatCurve("bf16", curve),)))
    entries = EXPERTS.layout.hidden + 3 * EXPERTS.layout.intermediate
    assert expert_entries(EXPERTS) == entries
    need = LayerDemand(8.0, 40.0)
    more = total(profile, need, 0.0, 1.0, 5) - total(plain, need, 0.0, 1.0, 5)
    assert more == pytest.approx(8 * 5 * entries * 1e-9)


@pytest.mark.parametrize(("tokens", "groups"), [(2048, 1), (2049, 17), (3072, 24)])
def test_outputs_beyond_what_a_step_keeps_are_computed_and_summed_in_groups(tokens: int, groups: int) -> None:
    plain = machine(gpu=False)
    overheads = replace(plain.cpu.overheads, grouped_output_s=1e-9)
    profile = replace(plain, cpu=replace(plain.cpu, overheads=overheads))
    need = LayerDemand(64.0, tokens * 8.0)
    outputs = tokens * 8 * EXPERTS.layout.hidden
    assert groups_of(outputs, accelerated=False) == groups
    assert groups_of(outputs, accelerated=True) == math.ceil(outputs * 4 / GROUP_NBYTES)
    rates = np.array([0.0]), np.array([1.0])
    costs = [
        expert_cost(EXPERTS, one, HOMES, need, tokens, *rates, on_gpu=False, decode=False) for one in (plain, profile)
    ]
    curve = plain.cpu.expert("bf16")
    computing = curve.seconds(64 * expert_weights(EXPERTS), need.tokens_per_expert) + (groups - 1) * curve.call_s
    assert float(costs[0].total_s[0]) == pytest.approx(computing)
    more = float(costs[1].total_s[0] - costs[0].total_s[0])
    assert more == pytest.approx(outputs * 1e-9 if groups > 1 else 0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("tokens", "calls", "summed"), [(512, 1, False), (513, 5, False), (2048, 16, False), (2049, 17, True)]
)
def test_with_an_accelerator_groups_are_summed_at_once_where_a_host_would_keep_them(
    tokens: int, calls: int, summed: bool
) -> None:
    plain = machine()
    overheads = replace(plain.cpu.overheads, grouped_output_s=1e-9)
    profile = replace(plain, cpu=replace(plain.cpu, overheads=overheads))
    outputs = tokens * 8 * EXPERTS.layout.hidden
    expected = (calls - 1) * plain.cpu.expert("bf16").call_s + (outputs * 1e-9 if summed else 0.0)
    assert grouping_s(EXPERTS, profile, outputs) == pytest.approx(expected)


def test_nothing_in_ram_is_bound_by_the_disk() -> None:
    profile = machine(gpu=False, disk=1e8)
    assert profile.disk is not None
    curve = profile.cpu.expert("bf16")
    last = curve.seconds(expert_weights(EXPERTS), 1)
    read = 8 * EXPERTS.layout.nbytes / profile.disk.bytes_per_s(EXPERTS.layout.nbytes, 4)
    assert total(profile, DECODE, 0.0, 0.0) == pytest.approx(profile.disk.latency_s + read + last, rel=0.01)


def played(profile: HardwareProfile, misses: int) -> float:
    """Resident experts in one call, then each that arrives; reads arrive evenly once they are under way."""
    assert profile.disk is not None
    curve = profile.cpu.expert("bf16")
    one = expert_weights(EXPERTS) * curve.seconds_per_weight(1)
    read = EXPERTS.layout.nbytes / profile.disk.bytes_per_s(EXPERTS.layout.nbytes, min(4, misses or 1))
    now = curve.call_s + (8 - misses) * one if misses < 8 else 0.0
    together = min(4, misses)
    for number in range(1, misses + 1):
        arrival = profile.disk.latency_s + max(number, together) * read
        now = max(now, arrival) + one + curve.call_s
    return now


@pytest.mark.parametrize("disk", [1e8, 1e9, 4e9, 1e11])
@pytest.mark.parametrize("ram", [0.0, 0.3, 0.9])
def test_misses_are_played_out(disk: float, ram: float) -> None:
    profile = machine(gpu=False, disk=disk)
    chances = [math.comb(8, m) * (1 - ram) ** m * ram ** (8 - m) for m in range(9)]
    expected = sum(chance * played(profile, m) for m, chance in enumerate(chances))
    assert total(profile, DECODE, 0.0, ram) == pytest.approx(expected, rel=0.12)


def test_reads_take_the_kernels_time() -> None:
    """Where neither gains from the other's company, a layer takes what both take one after the other."""
    free, taken = machine(gpu=False, disk=1e9), machine(gpu=False, disk=1e9, reading=0.1)
    assert free.disk is not None
    kernels = expert_weights(EXPERTS) * 8 * free.cpu.expert("bf16").seconds_per_weight(1)
    read = 8 * EXPERTS.layout.nbytes / free.disk.bytes_per_s(EXPERTS.layout.nbytes, 4)
    assert total(free, DECODE, 0.0, 0.0) < read + 0.4 * kernels
    assert total(taken, DECODE, 0.0, 0.0) == pytest.approx(read + kernels, rel=0.05)
    assert total(taken, DECODE, 0.0, 1.0) == total(free, DECODE, 0.0, 1.0)


def test_looking_for_experts_takes_time_unless_all_are_there() -> None:
    plain, slow = machine(gpu=False), machine(gpu=False, step=1e-3)
    assert total(slow, DECODE, 0.0, 1.0) == total(plain, DECODE, 0.0, 1.0)
    assert total(slow, DECODE, 0.0, 0.9) == pytest.approx(total(plain, DECODE, 0.0, 0.9) + 1e-3)


def test_the_split_is_the_best_of_all() -> None:
    profile = machine(ram=20e9, vram=400e9, link=12e9)
    assert profile.gpu is not None and profile.to_gpu is not None and profile.from_gpu is not None
    weights = expert_weights(EXPERTS)
    cpu, gpu = profile.cpu.expert("bf16"), profile.gpu.expert("bf16")
    activations = 1024 * 2
    crossing = profile.to_gpu.seconds(activations) + profile.from_gpu.seconds(activations)
    best = []
    for copied in range(9):
        g = weights * gpu.seconds_per_weight(1)
        here = 8 - copied
        on_cpu = cpu.seconds(here * weights, 1) + crossing if here else 0.0
        on_gpu = gpu.call_s + copied * g if copied else 0.0
        link = copied * profile.to_gpu.seconds(EXPERTS.layout.nbytes) + (g if copied else 0.0)
        best.append(max(on_cpu, on_gpu, link))
    assert total(profile, DECODE, 0.0, 1.0) == pytest.approx(min(best))
    assert 0 < best.index(min(best)) < 8


@settings(deadline=None, max_examples=50)
@given(machines, st.integers(1, 40), st.integers(1, 64), st.data())
def test_reading_less_is_never_slower(
    profile: HardwareProfile, distinct: int, tokens: int, data: st.DataObject
) -> None:
    vram = data.draw(st.floats(0, 1)) if profile.gpu else 0.0
    shares = sorted(data.draw(st.floats(0, 1 - vram)) for _ in range(2))
    need = LayerDemand(float(distinct), float(distinct * tokens))
    slow, fast = (total(profile, need, vram, share, tokens) for share in shares)
    assert fast <= slow * (1 + 1e-9)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(["ram", "vram", "link", "disk"]), st.floats(1, 50), st.integers(1, 20), st.data())
def test_a_faster_part_is_never_slower(part: str, times: float, distinct: int, data: st.DataObject) -> None:
    speeds = {"ram": 2e10, "vram": 3e11, "link": 1e10, "disk": 2e9}
    vram, ram = data.draw(st.floats(0, 0.5)), data.draw(st.floats(0, 0.5))
    need = LayerDemand(float(distinct), 2.0 * distinct)
    before = total(machine(**speeds), need, vram, ram, 4)  # type: ignore[arg-type]
    after = total(machine(**(speeds | {part: times * speeds[part]})), need, vram, ram, 4)  # type: ignore[arg-type]
    assert after <= before * (1 + 1e-9)


def test_terms_add_up_and_devices_are_no_busier_than_the_layer() -> None:
    profile = machine()
    for vram, ram, rows in itertools.product((0.0, 0.4), (0.1, 0.5), (1, 64)):
        need = LayerDemand(8.0, 8.0 * rows)
        rates = np.array([vram]), np.array([ram])
        cost = expert_cost(EXPERTS, profile, HOMES, need, rows, *rates, on_gpu=False)
        parts = cost.cpu_s + cost.gpu_s + cost.link_s + cost.disk_s
        assert cost.total_s[0] == pytest.approx(parts[0])
        for busy in (cost.cpu_busy_s, cost.gpu_busy_s, cost.link_busy_s, cost.disk_busy_s):
            assert busy[0] <= cost.total_s[0] * (1 + 1e-9)


def test_a_machine_without_a_disk_cannot_read() -> None:
    profile = replace(machine(gpu=False), disk=None)
    assert total(profile, DECODE, 0.0, 1.0) > 0
    with pytest.raises(ValueError, match="no disk"):
        total(profile, DECODE, 0.0, 0.5)


def test_the_layer_around_takes_longer_where_experts_were_read() -> None:
    profile = machine(gpu=False)
    assert profile.disk is not None
    profile = replace(profile, disk=replace(profile.disk, between=0.5))
    longer = longer_after_reads(profile, DECODE, np.array([0.0, 0.5, 1.0]))
    assert longer == pytest.approx([1.0, 1 - 0.5**8, 0.0])
    assert (longer_after_reads(replace(profile, disk=None), DECODE, np.array([0.0, 1.0])) == 0.0).all()
