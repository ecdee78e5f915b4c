"""A machine whose every time is known gives back its profile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from placement.hardware_profile import HardwareProfile, Overheads
from profiler import rounds
from profiler.effort import FULL, QUICK, Effort
from profiler.profile import measure_machine
from tests.profiler.known import (
    BLOCK_SCORE_S,
    BLOCKS,
    EXPERTS,
    FEW_SCORE_S,
    LINEARS,
    MACHINE,
    SCORE_S,
    SMALL_PASS_S,
    Known,
)


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls return their seconds instead of taking them."""
    monkeypatch.setattr(rounds, "repeated", lambda call, **_: [call()])


def test_every_figure_comes_back() -> None:
    subjects, said = Known(), []
    found = measure_machine(subjects, MACHINE, 1 << 40, say=said.append)
    assert found.cpu.expert("bf16").call_s == pytest.approx(2e-5, rel=1e-3)
    for tokens in (1, 3, 32, 512, 2000):
        assert found.cpu.expert("bf16").seconds_per_weight(tokens) == pytest.approx(1e-10 * tokens, rel=5e-3)
    assert found.cpu.expert("int4").entry_s == pytest.approx(EXPERTS["int4"].entry_s, rel=1e-2)
    assert found.cpu.expert("int4").item_s == pytest.approx(2e-6, rel=2e-2)
    assert found.cpu.linear("int4").seconds(10**6, 1) == pytest.approx(LINEARS["int4"].seconds(10**6, 1), rel=1e-3)
    assert found.cpu.linear("bf16").entry_s == pytest.approx(2e-9, rel=0.01)
    assert found.cpu.linear("int4").entry_s == pytest.approx(0, abs=1e-12)
    assert found.cpu.expert("fp16") == found.cpu.expert("bf16")
    attention = found.cpu.attention
    assert (attention.call_s, attention.few_flops_per_s, attention.flops_per_s) == pytest.approx((5e-5, 1e9, 1e11))
    assert attention.prompt_call_s == pytest.approx(9e-4)
    assert (attention.few_score_s, attention.score_s) == pytest.approx((FEW_SCORE_S, SCORE_S))
    assert [one.format for one in found.cpu.blocks] == ["bf16", "fp32", "fp8_e4m3", "int8", "int4", "fp16"]
    for one in found.cpu.blocks:
        expected = BLOCKS["bf16" if one.format == "fp16" else one.format]
        assert (one.call_s, one.flops_per_s) == pytest.approx(expected)
        assert one.score_s == pytest.approx(BLOCK_SCORE_S)
        assert one.bytes_per_s == found.cpu.memory_bytes_per_s
    assert found.disk is not None
    assert found.disk.bytes_per_s(4 << 20, 4) == pytest.approx(2e9, rel=0.002), "both ends of few reads would count"
    assert (found.disk.many.reads, found.disk.many.kernels) == pytest.approx((0.8, 0.6))
    # Kernels have no less than what reads leave.
    assert (found.disk.few.reads, found.disk.few.kernels) == pytest.approx((0.5, 0.5))
    assert found.disk.resident is not None
    assert (found.disk.resident.reads, found.disk.resident.kernels) == pytest.approx((0.8, 0.7))
    # The small read before is in both.
    assert found.disk.short_bursts[-1].bytes_per_s < found.disk.bursts[-1].bytes_per_s
    assert found.disk.few.bytes_per_s == pytest.approx(2e9, rel=0.01)
    assert found.disk.between == 0.7
    assert found.disk.first_bytes_per_s == 3e8
    assert found.disk.latency_s == pytest.approx(1e-4, rel=0.1)
    assert found.cpu.overheads == found.cpu.overheads_in("bf16") == Overheads(1e-3, 2e-4, 3e-9)
    assert found.cpu.packed_overheads == found.cpu.overheads_in("int8") == Overheads(1e-3, 5e-4, 3e-9)
    assert (found.cpu.small_step_s, found.cpu.small_prompt_s) == tuple(SMALL_PASS_S.values())
    assert subjects.profile is not None
    assert subjects.profile.cpu.overheads == Overheads(0, 0, 0), "overheads are what is left without any"
    assert (found.provenance.kind, found.provenance.fingerprint) == ("measured", MACHINE.fingerprint)
    assert found.provenance.notes == ()
    assert found.gpu is None
    assert len(said) == 4
    assert HardwareProfile.from_json(found.to_json()) == found


@pytest.mark.parametrize(("narrow_s", "products"), [(0.5, 1.0), (1.0, 0.1), (1.5, 0.1), (0.25, 1.0)])
def test_noise_leaves_neither_products_nor_scores_less_than_nothing(narrow_s: float, products: float) -> None:
    call_s, flops_per_s, score_s = rounds._line((0.0, 0.0, 0.0), (100.0, 10.0, 1.0), (50.0, 10.0, narrow_s))
    assert call_s == 0
    assert flops_per_s == pytest.approx(100 / products)
    # Wide heads take what they took.
    assert 100 / flops_per_s + 10 * score_s == pytest.approx(1.0)


@pytest.mark.parametrize("effort", [FULL, QUICK], ids=["full", "quick"])
def test_quick_measures_less_of_the_same(effort: Effort) -> None:
    found = measure_machine(Known(), MACHINE, 0, effort=effort)
    assert found.knows(["bf16", "fp16", "int4"])
    assert not found.knows(["bf16", "mxfp4"])
    assert found.cpu.expert("int4").seconds_per_weight(1) == pytest.approx(2e-11, rel=0.05)


def test_what_did_not_stand_still_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def shaky(call: Callable[[], float], **_: Any) -> list[float]:
        return [call(), 2 * call(), 2 * call()]

    monkeypatch.setattr(rounds, "repeated", shaky)
    (note,) = measure_machine(Known(), MACHINE, 0).provenance.notes
    assert "did not become stable" in note
    assert "100%" in note
