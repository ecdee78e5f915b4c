"""An accelerator whose every time is known gives back its part of a profile."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from placement.hardware_profile import HardwareProfile, Overheads
from profiler import rounds
from profiler.accelerator import measure_accelerator
from profiler.effort import FULL, QUICK, Effort
from tests.placement.machines import machine
from tests.profiler.known import EXPERTS, LINEARS, Known, KnownAccelerator

HOST = machine(gpu=False)


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls return their seconds instead of taking them."""
    monkeypatch.setattr(rounds, "repeated", lambda call, **_: [call()])


def test_every_figure_comes_back() -> None:
    subjects, said = KnownAccelerator(), []
    found = measure_accelerator(subjects, Known(), HOST, say=said.append)
    assert (found.cpu, found.disk) == (HOST.cpu, HOST.disk)
    gpu = found.gpu
    assert gpu is not None and found.to_gpu is not None and found.from_gpu is not None
    assert (gpu.memory_nbytes, gpu.memory_bytes_per_s) == (8 << 30, 2e12)
    for format in ("bf16", "fp16", "int4"):
        curve, law = gpu.expert(format), EXPERTS["int4"]
        assert curve.call_s == pytest.approx(0.01 * law.call_s, rel=1e-2)
        assert curve.item_s == pytest.approx(0.01 * law.item_s, rel=2e-2)
        assert curve.entry_s == pytest.approx(0.01 * law.entry_s, rel=1e-2)
        for tokens in (1, 7, 512):
            expected = 0.01 * law.seconds(10**7, tokens, 1, 30_000, 10)
            assert curve.seconds(10**7, tokens, 1, 30_000, 10) == pytest.approx(expected, rel=1e-2)
    for format, law in LINEARS.items():
        assert gpu.linear(format).seconds(10**6, 1, 1, 2000) == pytest.approx(
            0.01 * law.seconds(10**6, 1, 1, 2000), rel=1e-2
        )
    attention = gpu.attention
    assert (attention.call_s, attention.few_flops_per_s) == pytest.approx((5e-6, 1e12))
    assert (attention.prompt_call_s, attention.flops_per_s) == pytest.approx((9e-6, 1e13))
    # Copies beside the host's kernels take twice as long there.
    for link, law in ((found.to_gpu, (True, True)), (found.from_gpu, (False, False))):
        latency_s, bytes_per_s = subjects.LINKS[law]
        assert (link.latency_s, link.bytes_per_s) == pytest.approx((latency_s, bytes_per_s))
        assert link.overlapped_bytes_per_s == pytest.approx(bytes_per_s / 2)
    assert (gpu.overheads, gpu.packed_overheads) == (Overheads(2e-4, 3e-5, 1e-10), Overheads(2e-4, 4e-5, 1e-10))
    for profile in subjects.profiles.values():
        assert profile.gpu is not None
        assert profile.gpu.overheads == Overheads(0, 0, 0), "overheads are what is left without any"
    assert found.pinned_nbytes == HOST.cpu.memory_nbytes // 2
    others, pinned = found.provenance.notes
    assert "8.0 GB/s from pageable" in others and "22.0 GB/s" in others
    assert "4096 MiB" in pinned and "half of the RAM" in pinned
    assert len(said) == 4 and all("a card" in what for what in said)
    assert HardwareProfile.from_json(found.to_json()) == found


def test_memory_that_is_refused_is_the_limit() -> None:
    found = measure_accelerator(KnownAccelerator(lockable_nbytes=3 << 20), Known(), HOST)
    assert found.pinned_nbytes == 3 << 20
    assert "3 MiB" in found.provenance.notes[-1]


def test_quick_measures_fewer_formats_and_passes() -> None:
    subjects = KnownAccelerator()
    subjects.formats = ("bf16", "mxfp4", "int4")  # type: ignore[assignment]
    found = measure_accelerator(subjects, Known(), HOST, effort=QUICK)
    assert found.gpu is not None
    assert subjects.measured == {"bf16", "int4"}
    assert set(subjects.profiles) == {None}
    assert found.gpu.packed_overheads is None
    with pytest.raises(ValueError, match="mxfp4"):
        found.gpu.expert("mxfp4")


@pytest.mark.parametrize("effort", [FULL, QUICK], ids=["full", "quick"])
@pytest.mark.parametrize("seed", range(4))
def test_noise_leaves_curves_near_the_law_and_is_told(
    effort: Effort, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others on the machine only take time away: some repeats are half as long again."""
    disturbed = itertools.cycle([*[1.0, 1.5, 1.2, 1.3, 1.6, 1.4][seed:], 1.0])

    def shaky(call: Callable[[], float], **_: Any) -> list[float]:
        return [call() * next(disturbed) for _ in range(8)]

    monkeypatch.setattr(rounds, "repeated", shaky)
    found = measure_accelerator(KnownAccelerator(), Known(), HOST, effort=effort)
    assert found.gpu is not None
    # Curves are positive and ascend, or they could not be made.
    for tokens in (1, 32, 128):
        law = 0.01 * EXPERTS["int4"].seconds(10**8, tokens, 1, 3 * 10**5, 100)
        assert found.gpu.expert("bf16").seconds(10**8, tokens, 1, 3 * 10**5, 100) == pytest.approx(law, rel=0.25)
    assert found.provenance.notes[0].startswith("a card: ")
    assert "did not become stable" in found.provenance.notes[0]


class _Disturbed(KnownAccelerator):
    """Every third copy takes twice as long."""

    def __init__(self) -> None:
        super().__init__()
        self._turns = itertools.cycle([1.0, 1.0, 2.0])

    def copy(self, nbytes: int, count: int, *, up: bool, pinned: bool) -> float:
        return next(self._turns) * super().copy(nbytes, count, up=up, pinned=pinned)


def test_disturbed_copies_do_not_change_a_link() -> None:
    found = measure_accelerator(_Disturbed(), Known(), HOST)
    assert found.to_gpu is not None and found.from_gpu is not None
    for link, law in ((found.to_gpu, (True, True)), (found.from_gpu, (False, False))):
        assert (link.latency_s, link.bytes_per_s) == pytest.approx(KnownAccelerator.LINKS[law])
        assert link.overlapped_bytes_per_s <= link.bytes_per_s


class _Shaking(KnownAccelerator):
    """Copies to the device take longer each time."""

    def __init__(self) -> None:
        super().__init__()
        self._copies = 0

    def copy(self, nbytes: int, count: int, *, up: bool, pinned: bool) -> float:
        self._copies += up
        return (1 + self._copies % 5) ** up * super().copy(nbytes, count, up=up, pinned=pinned)


def test_copies_that_do_not_stand_still_are_told() -> None:
    note = measure_accelerator(_Shaking(), Known(), HOST).provenance.notes[0]
    assert note.startswith("a card: 8 of ")
    assert "to the device" in note
