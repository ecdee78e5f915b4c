from __future__ import annotations

import numpy as np
import pytest

from benchmarks.equality import Outcome, gate_close, gate_same_bits, gate_tokens, relative_maximum, relative_rms
from benchmarks.harness import GateError, Report
from benchmarks.sessions import Decoded

EXPECTED = np.array([[3.0, 4.0], [0.0, -5.0]], dtype=np.float32)


def test_measures() -> None:
    found = EXPECTED + np.array([[0.0, 0.5], [0.0, 0.0]], dtype=np.float32)
    assert relative_maximum(found, EXPECTED) == pytest.approx(0.1)
    assert relative_rms(found, EXPECTED) == pytest.approx(np.sqrt(0.25 / 50))


@pytest.mark.parametrize(
    "found",
    [EXPECTED * 1.02, EXPECTED[:1], np.full_like(EXPECTED, np.nan), np.full_like(EXPECTED, np.inf)],
    ids=["too far", "another shape", "nan", "inf"],
)
def test_logits_that_are_not_close_fail(found: np.ndarray) -> None:
    gate_close(Report("x"), "logits", EXPECTED * 1.005, EXPECTED, relative_rms, 0.01)
    with pytest.raises(GateError, match=r"tolerance 1\.0e-02"):
        gate_close(Report("x"), "logits", found, EXPECTED, relative_rms, 0.01)


def test_one_bit_fails() -> None:
    other = EXPECTED.copy()
    other[1, 1] = np.nextafter(other[1, 1], np.float32(0))
    gate_same_bits(Report("x"), "logits", {"a": EXPECTED, "b": EXPECTED.copy()})
    with pytest.raises(GateError, match="b = a: differ"):
        gate_same_bits(Report("x"), "logits", {"a": EXPECTED, "b": other})
    with pytest.raises(GateError):
        gate_same_bits(Report("x"), "tokens", {"a": [1, 2], "b": [1, 2], "c": [1]})


def outcome(tokens: list[int], margins: list[float], shift: float = 0.0) -> Outcome:
    return Outcome(EXPECTED + np.float32(shift), Decoded(tokens, margins))


def test_tokens_may_part_at_a_near_tie_only() -> None:
    expected = outcome([7, 8, 9], [1.0, 0.05, 1.0])
    same = outcome([7, 8, 9], [1.0, 0.05, 1.0], shift=0.1)
    gate_tokens(Report("x"), "tokens", same, expected)
    gate_tokens(Report("x"), "tokens", outcome([7, 8, 1], [], shift=0.1), expected)
    with pytest.raises(GateError, match="1 of 3 tokens equal, then a margin of 1;"):
        gate_tokens(Report("x"), "tokens", outcome([7, 1, 1], [], shift=0.1), expected)


def test_the_first_token_is_judged_by_the_prompt() -> None:
    # The last row's margin is 5.
    expected = outcome([7], [0.0])
    gate_tokens(Report("x"), "tokens", outcome([1], [], shift=6.0), expected)
    with pytest.raises(GateError, match="0 of 1 tokens equal, then a margin of 5;"):
        gate_tokens(Report("x"), "tokens", outcome([1], [], shift=4.0), expected)
