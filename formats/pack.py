"""Packing of weights, in numpy: what the layouts of `formats.packed` hold, and the reference of the compiled packer.

Every code is its weight divided by the scale (multiplied by the scale's fp32 reciprocal) and rounded to the nearest,
ties to even. The scale is the one of a few that leaves the least sum of squared errors, added in fp32 column by
column; the first of equals. Candidates are rounded to the scale's own type before they are tried. With a = the largest
magnitude of the group:

    int8      a / 127, a / 126.5, a / 127.5, a / 128
    int4      -m / 8, then -m / 6.75, -m / 7, ... -m / 8.75, where m is the weight with |m| = a
    mxfp4     2^(e - 2), 2^(e - 1), with e = floor(log2 a)
    fp8_e4m3  a / 448

Errors of a single weight w, with the chosen scale s:

    int8      at most a / 80, within |s| / 2 where |w / s| <= 127.5
    int4      at most 0.21 a,  within |s| / 2 where -8.5 <= w / s <= 7.5
    mxfp4     at most a / 4,   within a half of the distance between codes where |w / s| <= 6
    fp8_e4m3  at most max(|w| / 16, s / 1024), times 1 + 2^-20

Groups whose a is below SMALLEST_MAGNITUDE become zero, so that no scale is denormal: CPUs and GPUs disagree about
those. The code of zero has no sign. A weight that is not finite, or not below LARGEST_MAGNITUDE, is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from formats.packed import (
    E4M3_MAX,
    INT4_DIVISORS,
    INT8_DIVISORS,
    LARGEST_MAGNITUDE,
    SMALLEST_MAGNITUDE,
    TILE_ROWS,
    MatrixLayout,
)

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def pack_matrix(weights: Float32, format: str) -> tuple[Bytes, Bytes]:
    """Quantise one matrix.

    Args:
        weights: float32 [N, K].
        format: a key of PACKED_FORMATS.

    Returns:
        codes uint8 [codes_nbytes] and scales uint8 [scales_nbytes] as `MatrixLayout(N, K, format)` has them.

    Raises:
        ValueError: not a float32 matrix, an unknown format, or a weight that is not finite or not below
            LARGEST_MAGNITUDE.
    """
    if weights.dtype != np.float32 or weights.ndim != 2:
        raise ValueError(f"weights: expected float32 [rows, columns], found {weights.dtype.name} {weights.shape}")
    layout = MatrixLayout(weights.shape[0], weights.shape[1], format)
    if not (np.abs(weights) < LARGEST_MAGNITUDE).all():
        raise ValueError(f"weights: found NaN, infinity or magnitudes of 2^127 and more; {format} needs finite weights")
    if layout.packed.group_rows > 1:
        codes, scales = _quantise_blocks(weights, layout)
    else:
        padded = np.zeros((layout.padded_rows, layout.padded_columns), np.float32)
        padded[: layout.rows, : layout.columns] = weights
        codes, scales = _quantise_groups(padded, layout)
    return _tile_codes(codes, layout), scales


def unpack_matrix(codes: Bytes, scales: Bytes, layout: MatrixLayout) -> Float32:
    """The weights that packed bytes stand for: float32 [N, K], each its code's value times its scale, rounded once.

    Args:
        codes: uint8 [layout.codes_nbytes].
        scales: uint8 [layout.scales_nbytes].
        layout: of the matrix.

    Raises:
        ValueError: arrays of another size or type.
    """
    for name, array, nbytes in (("codes", codes, layout.codes_nbytes), ("scales", scales, layout.scales_nbytes)):
        if array.dtype != np.uint8 or array.shape != (nbytes,):
            raise ValueError(f"{name}: expected uint8 [{nbytes}], found {array.dtype.name} {array.shape}")
    packed = layout.packed
    values = code_values(layout.format)[_untile_codes(codes, layout)]
    factors = _scale_values(scales, layout)
    if packed.group_rows > 1:
        factors = factors.repeat(packed.group_rows, 0).repeat(packed.group, 1)
    else:
        factors = factors.transpose(0, 2, 1).reshape(layout.padded_rows, -1).repeat(packed.group, 1)
    rows, columns = layout.rows, layout.columns
    return values[:rows, :columns] * factors[:rows, :columns]


def code_values(format: str) -> Float32:
    """The value of each code without its scale: float32 [256], or [16] for 4 bits."""
    if format == "int8":
        return np.arange(-128, 128, dtype=np.float32)
    if format == "int4":
        return np.arange(-8, 8, dtype=np.float32)
    if format == "mxfp4":
        return np.concatenate([_E2M1_VALUES, -_E2M1_VALUES])
    if format == "fp8_e4m3":
        code = np.arange(128)
        exponent, mantissa = code >> 3, code & 7
        normal = (8 + mantissa) * 2.0 ** (exponent - 10)
        magnitude = np.where(exponent > 0, normal, mantissa * 2.0**-9)
        magnitude[127] = np.nan
        return np.concatenate([magnitude, -magnitude]).astype(np.float32)
    raise ValueError(f"unknown packed format {format!r}")


def round_to_bf16(values: Float32) -> Float32:
    """Finite values rounded to the nearest bf16, ties to even, as float32."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def _quantise_groups(weights: Float32, layout: MatrixLayout) -> tuple[Bytes, Bytes]:
    packed = layout.packed
    groups = weights.reshape(layout.padded_rows, -1, packed.group)
    at = np.abs(groups).argmax(2)[..., None]
    extreme = np.take_along_axis(groups, at, 2)[..., 0]
    live = np.abs(extreme) >= np.float32(SMALLEST_MAGNITUDE)
    extreme = np.where(live, extreme, np.float32(1))
    best_error = best_scale = None
    for scale in _candidates(extreme, layout.format):
        error = np.zeros_like(extreme)
        inverse = np.float32(1) / scale
        with np.errstate(over="ignore", under="ignore"):
            for column in range(packed.group):
                weight = groups[..., column]
                difference = weight - _nearest(weight * inverse, layout.format)[0] * scale
                error += difference * difference
        if best_error is None or best_scale is None:
            best_error, best_scale = error, scale
            continue
        better = error < best_error
        best_error, best_scale = np.where(better, error, best_error), np.where(better, scale, best_scale)
    assert best_scale is not None
    with np.errstate(under="ignore"):
        codes = _nearest(groups * (np.float32(1) / best_scale)[..., None], layout.format)[1]
    codes = np.where(live[..., None], codes, np.uint8(packed.zero_code))
    scales = np.where(live, best_scale, np.float32(1 if packed.scale == "e8m0" else 0))
    lying = scales.reshape(-1, TILE_ROWS, scales.shape[1]).transpose(0, 2, 1)
    bits = np.ascontiguousarray(lying).view(np.uint32)
    stored: npt.NDArray[Any] = (bits >> 23).astype(np.uint8) if packed.scale == "e8m0" else (bits >> 16).astype("<u2")
    return codes.reshape(weights.shape), stored.reshape(-1).view(np.uint8)


def _candidates(extreme: Float32, format: str) -> list[Float32]:
    """Scales to try, as they would be stored; extreme: the weight of largest magnitude of each group."""
    if format == "mxfp4":
        power = (extreme.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
        return [power * np.float32(0.25), power * np.float32(0.5)]
    divisors = INT8_DIVISORS if format == "int8" else INT4_DIVISORS
    numerator = np.abs(extreme) if format == "int8" else extreme
    return [round_to_bf16(numerator * (np.float32(1) / np.float32(divisor))) for divisor in divisors]


def _nearest(scaled: Float32, format: str) -> tuple[Float32, Bytes]:
    """The nearest value that a code has, and the code."""
    if format == "mxfp4":
        # Distances between codes are 1/2 up to 2, 1 up to 4, then 2: three lines, of which the least one holds.
        magnitude = np.abs(scaled)
        half = np.float32(0.5)
        code = np.minimum(np.rint(magnitude * 2), np.rint(magnitude) + 2)
        code = np.minimum(np.minimum(code, np.rint(magnitude * half) + 4), 7).astype(np.uint8)
        return np.copysign(_E2M1_VALUES[code], scaled), code | ((scaled < 0) & (code > 0)).astype(np.uint8) << 3
    low, high, offset = (-127, 127, 128) if format == "int8" else (-8, 7, 8)
    value = np.minimum(np.maximum(np.rint(scaled), np.float32(low)), np.float32(high))
    return value, (value.astype(np.int32) + offset).astype(np.uint8)


def _quantise_blocks(weights: Float32, layout: MatrixLayout) -> tuple[Bytes, Bytes]:
    packed = layout.packed
    blocks_down, blocks_across = layout.scales_shape
    codes = np.zeros((layout.padded_rows, layout.padded_columns), np.uint8)
    scales = np.ones(layout.scales_shape, "<f4")
    for down in range(blocks_down):
        rows = slice(down * packed.group_rows, (down + 1) * packed.group_rows)
        for across in range(blocks_across):
            columns = slice(across * packed.group, (across + 1) * packed.group)
            block = weights[rows, columns]
            largest = np.abs(block).max()
            if largest < np.float32(SMALLEST_MAGNITUDE):
                continue
            scale = largest * np.float32(1 / E4M3_MAX)
            scales[down, across] = scale
            with np.errstate(under="ignore"):
                nearest = nearest_e4m3(block * (np.float32(1) / scale))
            codes[rows, columns][: block.shape[0], : block.shape[1]] = nearest
    return codes, scales.reshape(-1).view(np.uint8)


def nearest_e4m3(scaled: Float32) -> Bytes:
    """Codes of the nearest e4m3 values; magnitudes are at most 448 but for rounding."""
    bits = scaled.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # 20 of fp32's 23 mantissa bits go; its exponent is biased by 127, e4m3's by 7.
    normal = ((magnitude + np.uint32(0x7FFFF) + ((magnitude >> 20) & 1)) >> 20) - np.uint32(120 << 3)
    denormal = np.rint(magnitude.view(np.float32) * np.float32(512)).astype(np.uint32, copy=False)
    code = np.where(magnitude >= np.uint32(121 << 23), normal, denormal)
    sign = ((scaled < 0) & (code > 0)).astype(np.uint8)
    signed: Bytes = np.bitwise_or(code.astype(np.uint8), np.left_shift(sign, 7), dtype=np.uint8)
    return signed


def _tile_codes(codes: Bytes, layout: MatrixLayout) -> Bytes:
    steps: npt.NDArray[Any]
    if layout.packed.bits == 8:
        steps = codes.reshape(-1, TILE_ROWS, layout.padded_columns // 4, 4)
    else:
        halves = codes.reshape(-1, TILE_ROWS, layout.padded_columns // 8, 2, 4)
        steps = halves[..., 0, :] | (halves[..., 1, :] << 4)
    return np.ascontiguousarray(steps.transpose(0, 2, 1, 3)).reshape(-1)


def _untile_codes(codes: Bytes, layout: MatrixLayout) -> Bytes:
    """[N_p, K_p] codes, one a byte."""
    steps = codes.reshape(layout.padded_rows // TILE_ROWS, -1, TILE_ROWS, 4).transpose(0, 2, 1, 3)
    halves: list[npt.NDArray[Any]] = [steps & 15, steps >> 4] if layout.packed.bits == 4 else [steps]
    return np.stack(halves, axis=3).reshape(layout.padded_rows, layout.padded_columns).astype(np.uint8)


def _scale_values(scales: Bytes, layout: MatrixLayout) -> Float32:
    """The scales as float32 in `layout.scales_shape`."""
    scale = layout.packed.scale
    if scale == "fp32":
        values = scales.view("<f4")
    elif scale == "bf16":
        values = (scales.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
        values[scales == 255] = np.nan
    return values.astype(np.float32).reshape(layout.scales_shape)
