"""Integer sums over panels of int8 and int4 against float64, and rounded weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cpu_kernels.isa import supports
from cpu_kernels.jit import entry
from cpu_kernels.kv_pairs import _tile, round_rows
from cpu_kernels.kv_pairs_simd import PairShape
from formats.kv import KvLayout
from formats.kv_pack import pack_kv_block, unpack_kv_block

ROWS, HEADS = 64, 2


@entry("void(int64, int64, int64, int64, int64)")
def _round(rows: int, count: int, heads: int, out: int, nbytes: int) -> None:
    round_rows(rows, count, heads, out, nbytes)


def _rounded(weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    out = np.zeros_like(weights)
    _round(weights.ctypes.data, weights.shape[1], len(weights), out.ctypes.data, weights.strides[0])
    return out


def test_weights_are_rounded_to_16_bits_of_their_largest() -> None:
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((5, ROWS)).astype(np.float32)
    weights[1] *= 1e30
    weights[2] = 0
    weights[3, 7], weights[4, 5] = np.nan, np.inf
    found = _rounded(weights)
    codes, scales = found.view(np.int16)[:, :ROWS], found[:, -1]
    for row in range(2):
        largest = np.abs(weights[row]).max()
        assert np.abs(codes[row]).max() == 32767
        error = np.abs(codes[row] * scales[row].astype(np.float64) - weights[row])
        assert error.max() <= largest * (1 / 65534 + 2**-23)
    assert not codes[2].any() and scales[2] == 0
    assert np.isnan(scales[3:]).all()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_sums_are_exact_with_and_without_products_of_pairs(format: str) -> None:
    layout = KvLayout(format, 1, 32, 64, ROWS)
    generator = np.random.default_rng(1)
    values = generator.standard_normal((1, ROWS, 64)).astype(np.float32)
    block = pack_kv_block(np.zeros((1, ROWS, 32), np.float32), values, layout)
    # What the codes are, without scales: the sum of their products with whole weights is exact.
    ones = np.ones(layout.parts["value_scales"].nbytes // (2 if format == "int4" else 4), np.float32)
    start = layout.parts["value_scales"].offset
    stored = (ones.view(np.uint32) >> 16).astype(np.uint16) if format == "int4" else ones
    block[start : start + stored.nbytes] = stored.view(np.uint8)
    if format == "int4":
        start = layout.parts["value_zeros"].offset
        block[start : start + stored.nbytes] = 0
    codes = unpack_kv_block(block, layout)[1][0].astype(np.float64)
    weights = generator.integers(-32767, 32768, (HEADS, ROWS)).astype(np.float32)
    weights[:, 0] = 32767
    rounded = _rounded(weights)
    wide = supports("avx512_vnni")
    nbytes, panels = weights.strides[0], block.ctypes.data + layout.parts["values"].offset
    shapes = [PairShape(format, HEADS, 4, chains=chains, pairs=pairs) for chains in (1, 4) for pairs in (True, False)]
    if format == "int8":
        shapes += [PairShape(format, HEADS, 2, chains=2, lanes=16, pairs=pairs) for pairs in {wide, False}]
    for shape in shapes:

        def run(panel: int, panel_nbytes: int, weights: int, out: int, shape: PairShape = shape) -> None:
            _tile(shape, panel, panel_nbytes, ROWS, weights, nbytes, out, 128, False, panel)

        out = np.full((HEADS, 32), np.nan, np.float32)
        entry()(run)(panels, 16 * ROWS, rounded.ctypes.data, out.ctypes.data)
        assert np.array_equal(out, (weights.astype(np.float64) @ codes[:, :32]).astype(np.float32))
