"""A machine that became slower since its profile was measured is found out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement.curves import BETWEEN_TOKENS
from placement.disk import BURST_READS, DiskPoint
from placement.hardware_profile import Speeds
from profiler import probe as probing
from profiler.probe import probe
from profiler.subjects import Product
from tests.placement.machines import machine
from tests.profiler.test_profile import Known

NOW = Speeds(between=1.0)


class Slower(Known):
    """A machine by its profile, whose parts have some of its speeds."""

    def __init__(self, speeds: Speeds) -> None:
        super().__init__()
        self.now, self.clock, self.asleep = speeds, 0.0, True
        known = machine(gpu=False)
        assert known.disk is not None
        self.was = replace(known, disk=replace(known.disk, bursts=(DiskPoint(1 << 20, 4, 4e8),)))

    def experts(self, format: str, count: int, tokens: int, *, narrow: bool = False) -> Product:
        weights = count * 10**6
        seconds = self.was.cpu.expert(format).seconds(weights, tokens)

        def call() -> None:
            at = {1: self.now.memory, BETWEEN_TOKENS: self.now.between}.get(tokens, self.now.arithmetic)
            assert at is not None
            self.clock += seconds / at
            self.asleep = True

        return Product(weights, call)

    def read(self, block_nbytes: int, in_flight: int, blocks: int) -> float:
        assert self.was.disk is not None
        disk = self.was.disk.times(self.now.disk, self.now.bursts)
        burst = blocks == BURST_READS
        speed = disk.burst_bytes_per_s(block_nbytes) if burst else disk.bytes_per_s(block_nbytes, in_flight)
        seconds = blocks * block_nbytes / speed
        woken_s, self.asleep = 0.01 if self.asleep else 0.0, False
        return seconds + woken_s


@pytest.mark.parametrize("speeds", [NOW, Speeds(0.5, 0.8, 0.25, 0.2, 0.6), Speeds(1.5, 1.1, 3.0, 1.5, 1.4)])
def test_speeds_come_back(speeds: Speeds, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = Slower(speeds)
    monkeypatch.setattr(probing, "perf_counter", lambda: subjects.clock)
    found = probe(subjects, subjects.was, "bf16", 1 << 20)
    bursts = 1.0 if speeds.bursts is None else speeds.bursts
    assert (found.memory, found.between, found.arithmetic, found.disk, found.bursts) == pytest.approx(
        (speeds.memory, speeds.between, speeds.arithmetic, speeds.disk, bursts)
    )
    assert subjects.clock == pytest.approx(3 / 4, abs=0.1), "reads take the rest of the second"
    without = probe(subjects, subjects.was, "bf16")
    assert (without.disk, without.bursts) == (1.0, None)


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
