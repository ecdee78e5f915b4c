"""A machine that became slower since its profile was measured is found out."""

from __future__ import annotations

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
        self.now, self.was, self.clock = speeds, machine(gpu=False), 0.0

    def experts(self, format: str, count: int, tokens: int, *, narrow: bool = False) -> Product:
        weights = count * 10**6
        seconds = self.was.cpu.expert(format).seconds(weights, tokens)

        def call() -> None:
            self.clock += seconds / (self.now.memory if tokens == 1 else self.now.arithmetic)

        return Product(weights, call)

    def read(self, block_nbytes: int, in_flight: int, blocks: int) -> float:
        assert self.was.disk is not None
        return blocks * block_nbytes / self.was.disk.times(self.now.disk).bytes_per_s(block_nbytes, in_flight)


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
