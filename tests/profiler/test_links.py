"""Links from timings of copies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.links import Copies, fit_link

SIZES = (16 << 10, 256 << 10, 2 << 20, 16 << 20)


@given(st.floats(0, 1e-3), st.floats(1e8, 1e11))
def test_a_law_comes_back(latency_s: float, bytes_per_s: float) -> None:
    found = fit_link([Copies(nbytes, latency_s + nbytes / bytes_per_s) for nbytes in SIZES])
    for nbytes in (4096, 1 << 20, 1 << 30):
        assert found[0] + nbytes / found[1] == pytest.approx(latency_s + nbytes / bytes_per_s, rel=1e-3, abs=1e-9)


@given(st.lists(st.floats(1e-6, 1e-1), min_size=4, max_size=4))
def test_whatever_was_timed_a_link_is_one(seconds: list[float]) -> None:
    latency_s, bytes_per_s = fit_link([Copies(*pair) for pair in zip(SIZES, seconds, strict=True)])
    assert latency_s >= 0
    assert bytes_per_s > 0


@given(st.lists(st.floats(0.9, 1.1), min_size=4, max_size=4))
def test_errors_of_a_tenth_stay_near(factors: list[float]) -> None:
    copies = [Copies(size, factor * (2e-5 + size / 2e10)) for size, factor in zip(SIZES, factors, strict=True)]
    latency_s, bytes_per_s = fit_link(copies)
    for size in SIZES:
        assert latency_s + size / bytes_per_s == pytest.approx(2e-5 + size / 2e10, rel=0.15)


def test_one_size_tells_nothing() -> None:
    with pytest.raises(ValueError, match="two sizes"):
        fit_link([Copies(1, 1.0), Copies(1, 2.0)])
    with pytest.raises(ValueError, match="take time"):
        fit_link([Copies(1, 0.0), Copies(2, 2.0)])
