"""Packed matrices: round trips within the stated bounds, the byte layout by hand, edges of shape and of magnitude."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.pack import code_values, pack_matrix, unpack_matrix
from formats.packed import INT4_DIVISORS, PACKED_FORMATS, SMALLEST_MAGNITUDE, MatrixLayout

FORMATS = sorted(PACKED_FORMATS)
BITS = {"int8": 8, "int4": 4, "mxfp4": 4, "fp8_e4m3": 8}

Float64 = npt.NDArray[np.float64]


def weights_of(rows: int, columns: int, seed: int, magnitude: float, kind: str) -> npt.NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    weights: npt.NDArray[Any] = generator.standard_normal((rows, columns))
    if kind == "heavy tails":
        weights = weights**5
    elif kind == "sparse":
        weights = weights * (generator.random((rows, columns)) < 0.05)
    elif kind == "bf16 steps":
        weights = np.rint(weights * 4) / 4
    weights = weights / max(np.abs(weights).max(), 1e-30) * magnitude
    return weights.astype(np.float32)


matrices = st.builds(
    weights_of,
    st.integers(1, 140),
    st.integers(1, 200),
    st.integers(0, 2**32),
    st.sampled_from([1.0, 0.02, 2.0**-116, 2.0**-117, 2.0**-118, 2.0**-140, 1e-12, 65504.0, 1.69e38]),
    st.sampled_from(["gaussian", "heavy tails", "sparse", "bf16 steps"]),
)


def group_maxima(weights: Float64, format: str) -> Float64:
    """The largest magnitude of the group of each weight."""
    packed = PACKED_FORMATS[format]
    result = np.zeros_like(weights)
    for row in range(0, weights.shape[0], packed.group_rows):
        for column in range(0, weights.shape[1], packed.group):
            here = (slice(row, row + packed.group_rows), slice(column, column + packed.group))
            result[here] = np.abs(weights[here]).max()
    return result


def bound(weights: Float64, format: str) -> Float64:
    largest = group_maxima(weights, format)
    share = {"int8": 1 / 80, "int4": 0.21, "mxfp4": 1 / 4, "fp8_e4m3": 0}[format]
    result = share * largest
    if format == "fp8_e4m3":
        result = np.maximum(np.abs(weights) / 16, largest / 448 / 1024) * (1 + 2.0**-19)
    return np.where(largest < SMALLEST_MAGNITUDE, np.abs(weights), result)


@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("format", FORMATS)
@given(weights=matrices)
def test_unpacked_weights_are_within_the_stated_bounds(format: str, weights: npt.NDArray[np.float32]) -> None:
    layout = MatrixLayout(*weights.shape, format)
    codes, scales = pack_matrix(weights, format)
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (
        np.uint8, (layout.codes_nbytes,), np.uint8, (layout.scales_nbytes,),
    )  # fmt: skip
    unpacked = unpack_matrix(codes, scales, layout)
    assert unpacked.dtype == np.float32
    assert np.isfinite(unpacked).all()
    exact = weights.astype(np.float64)
    error = np.abs(unpacked.astype(np.float64) - exact)
    assert (error <= bound(exact, format)).all()


@settings(deadline=None, max_examples=40)
@pytest.mark.parametrize(("format", "codes", "divisors"), [("int8", (-127, 127), [127]), ("int4", (-8, 7), [8])])
@given(weights=matrices)
def test_the_search_is_never_worse_than_the_plain_scale(
    format: str, codes: tuple[int, int], divisors: list[int], weights: npt.NDArray[np.float32]
) -> None:
    layout = MatrixLayout(*weights.shape, format)
    unpacked = unpack_matrix(*pack_matrix(weights, format), layout).astype(np.float64)
    group = layout.packed.group
    for row in range(weights.shape[0]):
        for column in range(0, weights.shape[1], group):
            part = weights[row, column : column + group].astype(np.float64)
            extreme = part[np.abs(part).argmax()]
            if abs(extreme) < SMALLEST_MAGNITUDE:
                continue
            scale = -extreme / 8 if format == "int4" else abs(extreme) / 127
            # A bf16 scale may be off by 2^-9, which moves each weight by at most that share of the largest.
            plain = part - np.clip(np.rint(part / scale), *codes) * scale
            found = part - unpacked[row, column : column + group]
            slack = np.sqrt(len(part)) * abs(extreme) * 2.0**-8
            if (np.abs(part) < 1e18).all() and abs(extreme) > 1e-15:
                assert np.sqrt((found**2).sum()) <= np.sqrt((plain**2).sum()) + slack


@pytest.mark.parametrize("format", FORMATS)
def test_every_weight_lies_where_the_layout_says(format: str) -> None:
    """Each code found by hand from row and column, not through the unpacker."""
    rows, columns = 37, 150
    weights = weights_of(rows, columns, 3, 1.0, "gaussian")
    layout = MatrixLayout(rows, columns, format)
    codes, scales = pack_matrix(weights, format)
    unpacked = unpack_matrix(codes, scales, layout)
    values = code_values(format)
    packed = layout.packed
    for row in (0, 1, 15, 16, 36):
        tile, lane = divmod(row, 16)
        for column in (0, 3, 4, 7, 8, 63, 64, 127, 128, 149):
            if BITS[format] == 8:
                at = tile * 16 * layout.padded_columns + column // 4 * 64 + lane * 4 + column % 4
                code = codes[at]
            else:
                at = tile * 8 * layout.padded_columns + column // 8 * 64 + lane * 4 + column % 4
                code = codes[at] >> 4 if column % 8 >= 4 else codes[at] & 15
            if format == "fp8_e4m3":
                scale = scales.view("<f4")[row // 128 * 2 + column // 128]
            else:
                index = (tile * (layout.padded_columns // packed.group) + column // packed.group) * 16 + lane
                if format == "mxfp4":
                    scale = np.float32(2.0 ** (int(scales[index]) - 127))
                else:
                    scale = (scales.view("<u2")[index : index + 1].astype(np.uint32) << 16).view(np.float32)[0]
            assert values[code] * scale == unpacked[row, column]


@pytest.mark.parametrize("format", FORMATS)
def test_padding_is_zero(format: str) -> None:
    weights = weights_of(17, 65, 5, 1.0, "gaussian")
    layout = MatrixLayout(17, 65, format)
    whole = MatrixLayout(layout.padded_rows, layout.padded_columns, format)
    codes, scales = pack_matrix(weights, format)
    assert layout.codes_nbytes == whole.codes_nbytes
    assert layout.scales_nbytes == whole.scales_nbytes
    unpacked = unpack_matrix(codes, scales, whole)
    assert not unpacked[17:].any()
    assert not unpacked[:, 65:].any()
    if format == "int8":
        padding = scales.view("<u2").reshape(2, 2, 16)[1, :, 1:]
        assert not padding.any()


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zero_beside_others(format: str) -> None:
    weights = np.zeros((130, 260), np.float32)
    weights[5, 3] = 1.0
    weights[129, 259] = -1e-45
    unpacked = unpack_matrix(*pack_matrix(weights, format), MatrixLayout(130, 260, format))
    assert unpacked[5, 3] == pytest.approx(1.0, rel=0.01)
    unpacked[5, 3] = 0
    assert not unpacked.any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**127, -3.4e38])
def test_weights_that_are_not_finite_are_refused(format: str, bad: float) -> None:
    weights = np.ones((20, 70), np.float32)
    weights[19, 69] = bad
    with pytest.raises(ValueError, match="needs finite weights"):
        pack_matrix(weights, format)


@pytest.mark.parametrize("format", FORMATS)
def test_values_that_the_format_has_come_back_exactly(format: str) -> None:
    values = code_values(format)
    values = values[np.isfinite(values) & (values != -128)]
    columns = PACKED_FORMATS[format].group
    weights = np.zeros((len(values), columns), np.float32)
    weights[:, 0] = values
    # The largest code of each group sets the scale to a power of two.
    weights[:, 1] = {"int8": 127, "int4": -8, "mxfp4": 6, "fp8_e4m3": 448}[format]
    weights *= 2.0**-9
    unpacked = unpack_matrix(*pack_matrix(weights, format), MatrixLayout(*weights.shape, format))
    np.testing.assert_array_equal(unpacked, weights)


@pytest.mark.parametrize(
    ("magnitude", "value"),
    [(0.2, 0), (0.25, 0), (0.3, 0.5), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (2.6, 3), (3.5, 4), (5, 4), (5.1, 6)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_mxfp4_rounds_to_the_nearest_and_ties_to_even(magnitude: float, value: float, sign: int) -> None:
    weights = np.zeros((1, 32), np.float32)
    weights[0, :2] = 6, sign * magnitude
    assert unpack_matrix(*pack_matrix(weights, "mxfp4"), MatrixLayout(1, 32, "mxfp4"))[0, 1] == sign * value


def test_int4_uses_its_widest_code_for_extremes_of_either_sign() -> None:
    weights = np.array([[8.0] + [0.9] * 31, [-8.0] + [0.9] * 31], np.float32)
    codes, scales = pack_matrix(weights, "int4")
    first = (scales.view("<u2")[:2].astype(np.uint32) << 16).view(np.float32)
    assert first[0] < 0 < first[1]
    assert list(codes[[0, 4]] & 15) == [0, 0]
    assert min(INT4_DIVISORS) < -8 < max(INT4_DIVISORS)


@pytest.mark.parametrize(
    ("format", "bits_a_weight"), [("int8", 8.25), ("int4", 4.5), ("mxfp4", 4.25), ("fp8_e4m3", 8 + 32 / 16384)]
)
def test_bits_of_a_weight(format: str, bits_a_weight: float) -> None:
    assert MatrixLayout(256, 384, format).nbytes * 8 == 256 * 384 * bits_a_weight


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected float32.*float64"):
        pack_matrix(np.zeros((2, 2)), "int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'int3'.*int8, int4"):
        pack_matrix(np.zeros((2, 2), np.float32), "int3")
    with pytest.raises(ValueError, match="has no weights"):
        pack_matrix(np.zeros((0, 2), np.float32), "int8")
    layout = MatrixLayout(2, 2, "int8")
    codes, scales = pack_matrix(np.zeros((2, 2), np.float32), "int8")
    with pytest.raises(ValueError, match=r"codes: expected uint8 \[1024\]"):
        unpack_matrix(codes[:-1], scales, layout)
    with pytest.raises(ValueError, match="scales: expected uint8"):
        unpack_matrix(codes, scales[:-1], layout)
