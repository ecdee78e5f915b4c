"""A machine that became slower since its profile was measured is found out, each kind of work by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest

from placement.curves import BETWEEN_TOKENS
from placement.disk import BURST_READS, DiskPoint
from placement.hardware_profile import SMALL_PROMPT_TOKENS, HardwareProfile, Speeds
from profiler import probe as probing
from profiler.probe import probe
from profiler.subjects import Attention, Product
from tests.placement.machines import machine
from tests.profiler.known import SMALL_PASS_S
from tests.profiler.test_profile import Known

NOW = Speeds(between=1.0)
SLOWER = Speeds(0.5, 0.8, 0.25, 0.2, 0.6, 0.55, 0.65, 0.9, 0.4, 0.7, 0.45, 0.35)
FASTER = Speeds(1.5, 1.1, 3.0, 1.5, 1.4, 1.2, 1.3, 1.15, 1.9, 1.6, 1.7, 1.8)


def known() -> HardwareProfile:
    """A machine with a small model's passes, and bursts; what enters and leaves experts takes time of its own."""
    made = machine(gpu=False)
    assert made.disk is not None
    experts = tuple(replace(one, curve=replace(one.curve, entry_s=1e-9)) for one in made.cpu.experts)
    cpu = replace(
        made.cpu, experts=experts, small_step_s=SMALL_PASS_S[1], small_prompt_s=SMALL_PASS_S[SMALL_PROMPT_TOKENS]
    )
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
        if narrow:
            weights, entries = count * 10**5, count * 10**3
            seconds = curve.with_speeds(*self.now.of_experts).seconds(weights, tokens, 1, entries, count)
            return Product(weights, self._takes(seconds), entries, 1, count)
        seconds = curve.seconds(count * 10**6, tokens) / _at(tokens, *self.now.of_experts[:3])
        return Product(count * 10**6, self._takes(seconds))

    def linear(self, format: str, rows: int, tokens: int) -> Product:
        seconds = 4 * self.was.cpu.linear(format).seconds(rows * 10**3, tokens)
        return Product(rows * 10**3, self._takes(seconds / _at(tokens, *self.now.of_linears)), 0, 4)

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
        expected = getattr(speeds, part.name)
        # As what it goes by where it was not told apart.
        assert getattr(found, part.name) == pytest.approx(1.0 if expected is None else expected), part.name
    assert subjects.clock == pytest.approx(5 / 6, abs=0.15), "reads take the rest of the second"
    without = probe(subjects, subjects.was, "bf16")
    assert (without.disk, without.bursts) == (1.0, None)


@pytest.mark.parametrize(("entries", "found"), [(100.0, 5.0), (0.01, 0.2)])
def test_what_little_is_left_is_not_told_beyond_reason(
    entries: float, found: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = Slower(replace(NOW, entries=entries))
    monkeypatch.setattr(probing, "perf_counter", lambda: subjects.clock)
    assert probe(subjects, subjects.was, "bf16").entries == pytest.approx(found)
    curves = tuple(replace(one, curve=replace(one.curve, entry_s=0.0)) for one in subjects.was.cpu.experts)
    plain = replace(subjects.was, cpu=replace(subjects.was.cpu, experts=curves))
    assert probe(subjects, plain, "bf16").entries is None, "they are said to take no time"


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
