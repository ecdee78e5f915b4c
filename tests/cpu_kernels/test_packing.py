"""The compiled packer gives the reference's bytes, and writes nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from cpu_kernels.packing import pack_into
from cpu_kernels.threads import Pool, ThreadPool
from formats.pack import pack_matrix, round_to_bf16
from formats.packed import PACKED_FORMATS, MatrixLayout
from tests.formats.test_pack import matrices, weights_of

FORMATS = sorted(PACKED_FORMATS)
GUARD = 64


def packed(weights: npt.NDArray[Any], format: str, pool: Pool | None = None) -> list[npt.NDArray[np.uint8]]:
    """Codes and scales out of poisoned memory with guard bytes around them."""
    layout = MatrixLayout(*weights.shape, format)
    buffers = [np.full(nbytes + 2 * GUARD, 0xA5, np.uint8) for nbytes in (layout.codes_nbytes, layout.scales_nbytes)]
    parts = [buffer[GUARD:-GUARD] for buffer in buffers]
    pack_into(weights, layout, parts[0], parts[1], pool)
    for buffer in buffers:
        assert (buffer[:GUARD] == 0xA5).all()
        assert (buffer[-GUARD:] == 0xA5).all()
    return parts


def assert_as_reference(weights: npt.NDArray[Any], exact: npt.NDArray[np.float32], format: str) -> None:
    for found, expected in zip(packed(weights, format), pack_matrix(exact, format), strict=True):
        np.testing.assert_array_equal(found, expected)


@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("format", FORMATS)
@given(weights=matrices)
def test_fp32_gives_the_bytes_of_the_reference(format: str, weights: npt.NDArray[np.float32]) -> None:
    assert_as_reference(weights, weights, format)


@settings(deadline=None, max_examples=20)
@pytest.mark.parametrize("format", FORMATS)
@given(weights=matrices)
def test_bf16_gives_the_bytes_of_the_reference(format: str, weights: npt.NDArray[np.float32]) -> None:
    exact = round_to_bf16(weights)
    assert_as_reference((exact.view(np.uint32) >> 16).astype(np.uint16), exact, format)


@pytest.mark.parametrize("format", FORMATS)
def test_fp16_gives_the_bytes_of_the_reference(format: str) -> None:
    half = weights_of(50, 130, 7, 60000.0, "heavy tails").astype(np.float16)
    assert_as_reference(half, half.astype(np.float32), format)


@pytest.mark.parametrize("format", FORMATS)
def test_special_values(format: str) -> None:
    """Zeros of either sign, denormals, ties, the largest and the smallest that are kept, each beside others."""
    values = [
        0.0,
        -0.0,
        1e-45,
        -1e-40,
        2.0**-117,
        -(2.0**-117),
        2.0**-118,
        0.5,
        -0.5,
        1.5,
        -2.5,
        7.5,
        -8.5,
        448.0,
        464.0,
    ]
    values += [np.nextafter(np.float32(2.0**127), np.float32(0)), -1.7e38, 3.3e38 / 2, 2.0**-126]
    weights = np.array(values, np.float32)
    rows = [np.resize(np.roll(weights, shift)[: shift + 1], 64) for shift in range(len(values))]
    assert_as_reference(np.array(rows, np.float32), np.array(rows, np.float32), format)
    for value in values:
        one = np.full((1, 1), value, np.float32)
        assert_as_reference(one, one, format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(format: str, threads: int) -> None:
    weights = weights_of(300, 200, 11, 0.05, "gaussian")
    with ThreadPool(threads) as pool:
        found = packed(weights, format, pool)
    for part, expected in zip(found, pack_matrix(weights, format), strict=True):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_may_lie_apart(format: str) -> None:
    whole = np.full((40, 300), np.nan, np.float32)
    whole[:, 100:200] = weights_of(40, 100, 13, 1.0, "gaussian")
    assert_as_reference(whole[:, 100:200], np.ascontiguousarray(whole[:, 100:200]), format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**127, -3.4e38])
@pytest.mark.parametrize("place", [(0, 0), (17, 64), (149, 129)])
def test_weights_that_are_not_finite_are_refused(format: str, bad: float, place: tuple[int, int]) -> None:
    weights = np.ones((150, 130), np.float32)
    weights[place] = bad
    with pytest.raises(ValueError, match=f"{format} needs finite weights"):
        packed(weights, format)


def test_bad_arguments_are_refused() -> None:
    layout = MatrixLayout(20, 70, "int8")
    weights = np.zeros((20, 70), np.float32)
    codes, scales = np.zeros(layout.codes_nbytes, np.uint8), np.zeros(layout.scales_nbytes, np.uint8)
    with pytest.raises(ValueError, match=r"expected float32.*\[20, 70\], found float64"):
        pack_into(weights.astype(np.float64), layout, codes, scales)
    with pytest.raises(ValueError, match=r"found float32 \(19, 70\)"):
        pack_into(weights[:-1], layout, codes, scales)
    with pytest.raises(ValueError, match="must be contiguous"):
        pack_into(np.zeros((70, 20), np.float32).T, layout, codes, scales)
    with pytest.raises(ValueError, match="codes: expected contiguous"):
        pack_into(weights, layout, codes[1:], scales)
    with pytest.raises(ValueError, match="scales: expected contiguous"):
        pack_into(weights, layout, codes, scales.view(np.uint16))  # type: ignore[arg-type]
    scales.flags.writeable = False
    with pytest.raises(ValueError, match="scales: the array is read-only"):
        pack_into(weights, layout, codes, scales)
