"""A machine that became slower since its profile was measured is found out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement.hardware_profile import Speeds
from profiler import probe as probing
from profiler.probe import probe
from profiler.subjects import Product
from tests.placement.machines import machine
from tests.profiler.test_profile import Known


class Slower(Known):
    """A machine by its profile, whose parts have some of its speeds."""

    def __init__(self, speeds: Speeds) -> None:
        super().__init__()
        self.now, self.was, self.clock, self.asleep = speeds, machine(gpu=False), 0.0, True

    def experts(self, format: str, count: int, tokens: int, *, narrow: bool = False) -> Product:
        weights = count * 10**6
        seconds = self.was.cpu.expert(format).seconds(weights, tokens)

        def call() -> None:
            self.clock += seconds / (self.now.memory if tokens == 1 else self.now.arithmetic)
            self.asleep = True

        return Product(weights, call)

    def read(self, block_nbytes: int, in_flight: int, blocks: int) -> float:
        assert self.was.disk is not None
        seconds = blocks * block_nbytes / self.was.disk.times(self.now.disk).bytes_per_s(block_nbytes, in_flight)
        woken_s, self.asleep = 0.01 if self.asleep else 0.0, False
        return seconds + woken_s


@pytest.mark.parametrize("speeds", [Speeds(), Speeds(0.5, 0.8, 0.25), Speeds(1.5, 1.1, 3.0)])
def test_speeds_come_back(speeds: Speeds, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = Slower(speeds)
    monkeypatch.setattr(probing, "perf_counter", lambda: subjects.clock)
    found = probe(subjects, subjects.was, "bf16", 1 << 20)
    assert (found.memory, found.arithmetic, found.disk) == pytest.approx(
        (speeds.memory, speeds.arithmetic, speeds.disk)
    )
    assert subjects.clock == pytest.approx(2 / 3, abs=0.1), "reads take the rest of the second"
    assert probe(subjects, subjects.was, "bf16").disk == 1.0


def test_an_error_of_one_point_is_not_taken_for_the_machines_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = Slower(Speeds())
    monkeypatch.setattr(probing, "perf_counter", lambda: subjects.clock)
    (plain, *others) = subjects.was.cpu.experts
    points = [(tokens, plain.curve.seconds_per_weight(tokens)) for tokens in (1, 32, 64, 128)]
    off = [(tokens, seconds * (1.25 if tokens == 32 else 1.0)) for tokens, seconds in points]
    curve = replace(plain.curve, tokens=tuple(t for t, _ in off), weight_s=tuple(s for _, s in off))
    cpu = replace(subjects.was.cpu, experts=(replace(plain, curve=curve), *others))
    found = probe(subjects, replace(subjects.was, cpu=cpu), plain.format)
    assert 1.0 < found.arithmetic < 1.25 ** (1 / 3) + 1e-3
