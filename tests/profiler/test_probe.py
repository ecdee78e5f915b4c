"""A machine that became slower since its profile was measured is found out, each kind of work by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, fields, replace

import pytest

from placement.curves import BETWEEN_TOKENS, SmallProducts
from placement.disk import BURST_READS, DiskPoint
from placement.hardware_profile import SMALL_PROMPT_TOKENS, HardwareProfile, Speeds
from profiler import probe as probing
from profiler.probe import probe
from profiler.subjects import Attention, Product
from tests.placement.machines import machine
from tests.profiler.known import SMALL_PASS_S
from tests.profiler.test_profile import Known

WIDE, NARROW, LARGE, SMALL = 10**6, 10**5, 2048 * 10**3, 256 * 10**3
"""Weights of experts and of linear layers."""
SAME = SmallProducts(NARROW, WIDE, 1.0, 1.0), SmallProducts(SMALL, LARGE, 1.0, 1.0)
FEW = SmallProducts(NARROW, WIDE, 0.7, 0.6), SmallProducts(SMALL, LARGE, 1.3, 0.9)
OTHERS = SmallProducts(NARROW, WIDE, 1.2, 1.6), SmallProducts(SMALL, LARGE, 0.8, 0.5)
NOW = Speeds(between=1.0, small_experts=SAME[0], small_linears=SAME[1])
SLOWER = Speeds(0.5, 0.8, 0.25, 0.2, 0.6, 0.55, 0.65, 0.9, *FEW, 0.7, 0.45, 0.35)
FASTER = Speeds(1.5, 1.1, 3.0, 1.5, 1.4, 1.2, 1.3, 1.15, *OTHERS, 1.6, 1.7, 1.8)


def known() -> HardwareProfile:
    """A machine with a small model's passes, and bursts."""
    made = machine(gpu=False)
    assert made.disk is not None
    cpu = replace(made.cpu, small_step_s=SMALL_PASS_S[1], small_prompt_s=SMALL_PASS_S[SMALL_PROMPT_TOKENS])
    return replace(made, cpu=cpu, disk=replace(made.disk, bursts=(DiskPoint(1 << 20, 4, 4e8),)))


class Slower(Known):
    """A machine by its profile, whose parts have some of its speeds."""

    def __init__(self, speeds: Speeds) -> None:
        super().__init__()
        self.now, self.clock, self.asleep = speeds, 0.0, True
        self.was = known()

    def _takes(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.clock += seconds
            self.asleep = True

        return call

    def experts(self, format: str, count: int, tokens: int, *, narrow: bool = False) -> Product:
        curve = self.was.cpu.expert(format)
        weights = count * (NARROW if narrow else WIDE)
        if narrow:
            seconds = curve.with_speeds(*self.now.of_experts).seconds(weights, tokens, 1, 0, count)
        else:
            seconds = curve.seconds(weights, tokens, 1, 0, count) / _at(tokens, *self.now.of_experts[:3])
        return Product(weights, self._takes(seconds), 0, 1, count)

    def linear(self, format: str, rows: int, tokens: int) -> Product:
        curve, weights = self.was.cpu.linear(format), rows * 10**3
        if weights == SMALL:
            seconds = curve.with_speeds(*self.now.of_linears).seconds(weights, tokens)
        else:
            seconds = curve.seconds(weights, tokens) / _at(tokens, *self.now.of_linears[:3])
        return Product(weights, self._takes(4 * seconds), 0, 4)

    def attention(self, new_tokens: int, cached_tokens: int, *, narrow: bool = False) -> Attention:
        seconds = self.was.cpu.attention.seconds(1e6, 1e9, new_tokens, 1e4)
        return Attention(10**6, 1e9, self._takes(seconds / (self.now.attention or self.now.arithmetic)), scores=1e4)

    def small_pass(self, tokens: int) -> Callable[[], object]:
        speed = self.now.of_steps if tokens == 1 else self.now.of_prompts
        return self._takes(SMALL_PASS_S[tokens] / speed)

    def read(self, block_nbytes: int, in_flight: int, blocks: int) -> float:
        assert self.was.disk is not None
        disk = self.was.disk.times(self.now.disk, self.now.bursts)
        burst = blocks == BURST_READS
        speed = disk.burst_bytes_per_s(block_nbytes) if burst else disk.bytes_per_s(block_nbytes, in_flight)
        seconds = blocks * block_nbytes / speed
        woken_s, self.asleep = 0.01 if self.asleep else 0.0, False
        return seconds + woken_s


def _at(tokens: int, few: float, many: float, between: float | None) -> float:
    speed = {1: few, BETWEEN_TOKENS: between}.get(tokens, many)
    assert speed is not None
    return speed


@pytest.mark.parametrize("speeds", [NOW, SLOWER, FASTER])
def test_speeds_come_back(speeds: Speeds, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = Slower(speeds)
    monkeypatch.setattr(probing, "perf_counter", lambda: subjects.clock)
    found = probe(subjects, subjects.was, "bf16", 1 << 20)
    for part in fields(Speeds):
        expected, one = getattr(speeds, part.name), getattr(found, part.name)
        if isinstance(expected, SmallProducts):
            expected, one = astuple(expected), astuple(one)
        # As what it goes by where it was not told apart.
        assert one == pytest.approx(1.0 if expected is None else expected), part.name
    assert subjects.clock == pytest.approx(7 / 8, abs=0.25), "reads take the rest of the second"
    without = probe(subjects, subjects.was, "bf16")
    assert (without.disk, without.bursts) == (1.0, None)


@pytest.mark.parametrize(("speed", "found"), [(100.0, 5.0), (0.01, 0.2)])
def test_noise_is_not_believed_beyond_reason(speed: float, found: float, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = Slower(replace(NOW, small_experts=SmallProducts(NARROW, WIDE, speed, speed)))
    monkeypatch.setattr(probing, "perf_counter", lambda: subjects.clock)
    small = probe(subjects, subjects.was, "bf16").small_experts
    assert small is not None
    assert (small.few, small.many) == pytest.approx((found, found))


def test_a_profile_without_small_passes_has_no_speeds_of_them() -> None:
    subjects = Slower(NOW)
    cpu = replace(subjects.was.cpu, small_step_s=None)
    found = probe(subjects, replace(subjects.was, cpu=cpu), "bf16", seconds=0.0)
    assert (found.steps, found.prompts) == (None, None)
    assert found.of_steps == found.of_prompts == found.arithmetic


def test_an_error_of_one_point_is_not_taken_for_the_machines_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = Slower(NOW)
    monkeypatch.setattr(probing, "perf_counter", lambda: subjects.clock)
    (plain, *others) = subjects.was.cpu.experts
    points = [(tokens, plain.curve.seconds_per_weight(tokens)) for tokens in (1, 32, 64, 128)]
    off = [(tokens, seconds * (1.25 if tokens == 32 else 1.0)) for tokens, seconds in points]
    curve = replace(plain.curve, tokens=tuple(t for t, _ in off), weight_s=tuple(s for _, s in off))
    cpu = replace(subjects.was.cpu, experts=(replace(plain, curve=curve), *others))
    found = probe(subjects, replace(subjects.was, cpu=cpu), plain.format)
    assert 1.0 < found.arithmetic < 1.25 ** (1 / 3) + 1e-3
