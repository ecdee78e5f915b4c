"""What passes from disk tell, against made-up ones of which it is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.measuring.from_disk import DecodeFromDisk, PromptFromDisk, median_of
from placement.disk import Overlap


def made(kernels: float, reads: float, arrival_s: float, layers: int = 2) -> PromptFromDisk:
    """Layers of 5 experts that take 2 ms each, read in 4 ms each, the first of them in 4 ms; while one works the other
    has a share of its speed.
    """
    loads, one_s, read_s = 5 * layers, 2e-3, 4e-3
    beside_s = (loads - layers) * one_s / kernels
    # Reads go on at full speed when kernels have nothing to do.
    reading_s = beside_s + (loads - layers) * read_s - reads * beside_s
    last_s, first_s = layers * one_s, layers * read_s
    return PromptFromDisk(
        1, first_s + reading_s + last_s + loads * arrival_s, beside_s + last_s, loads * one_s,
        first_s + (loads - layers) * read_s - reads * beside_s, loads * read_s, loads, layers, 10**6,
    )  # fmt: skip


@pytest.mark.parametrize(("kernels", "reads"), [(0.5, 0.9), (0.8, 0.3), (1.0, 1.0)])
@pytest.mark.parametrize("arrival_s", [0.0, 3e-4])
def test_shares_and_arrivals_come_back(kernels: float, reads: float, arrival_s: float) -> None:
    found = made(kernels, reads, arrival_s)
    assert (found.overlap.kernels, found.overlap.reads) == pytest.approx((kernels, reads))
    assert found.overlap.bytes_per_s == pytest.approx(10**6 / 4e-3)
    assert found.arrival_s == pytest.approx(kernels * arrival_s, abs=1e-9)


seconds = st.floats(0.0, 1.0)


@given(st.tuples(*[seconds] * 5), st.integers(1, 64), st.integers(1, 4))
def test_noise_gives_shares_still(parts: tuple[float, ...], loads: int, layers: int) -> None:
    found = PromptFromDisk(1, *parts, max(loads, layers), layers, 10**6)
    assert found.overlap.together >= 1 - 1e-9
    assert found.arrival_s >= 0


@pytest.mark.parametrize("kernels", [0.5, 1.0])
@pytest.mark.parametrize("arrival_s", [0.0, 2e-4, 3e-3])
def test_what_arriving_takes_in_decode_comes_back(kernels: float, arrival_s: float) -> None:
    """In a layer of the planner's own: 6 experts of 1 ms, read in 12 ms, the first of them in 3."""
    overlap = Overlap(1, 0.8, kernels)
    rest_s = 1e-4 + 5 * (1e-3 + arrival_s)
    layer_s = 5e-5 + 3e-3 + float(overlap.seconds(np.array(rest_s), np.array(9e-3))) + 1e-3 + arrival_s
    found = DecodeFromDisk(2 * layer_s, 24e-3, 6e-3, 12, 2, 10**6)
    assert found.arrival_s(1e-3, 1e-4, 5e-5, overlap) == pytest.approx(arrival_s, abs=1e-9)
    faster = DecodeFromDisk(1e-3, 24e-3, 6e-3, 12, 2, 10**6)
    assert faster.arrival_s(1e-3, 1e-4, 5e-5, overlap) == pytest.approx(0, abs=1e-9)


def test_a_median_is_of_each_part() -> None:
    found = median_of([made(0.5, 0.9, 0.0), made(0.5, 0.9, 1e-3), made(0.5, 0.9, 2e-3)])
    assert found.layers_s == made(0.5, 0.9, 1e-3).layers_s
    assert isinstance(found.loads, int)
