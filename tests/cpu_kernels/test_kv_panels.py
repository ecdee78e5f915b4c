"""Weighted sums over the rows of panels: the same bits from every kind of code, and numbers against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cpu_kernels.jit import entry
from cpu_kernels.kv_pairs import add_int4_half, multiply_int8_panels, round_rows
from cpu_kernels.kv_panels import dot_panels, multiply_panels
from cpu_kernels.kv_simd import FP8_FACTOR, KvCode

ROWS, PANELS, MOST_HEADS = 70, 5, 15
Floats = np.ndarray[Any, np.dtype[np.float32]]


def _narrower(code: KvCode) -> list[KvCode]:
    """What a CPU with fewer registers, and without tables, takes."""
    return [replace(code, registers=registers, tables=False) for registers in (16, 32)]


def _sums(multiply: Callable[..., None], panels: Any, weights: Floats, heads: int) -> Floats:
    out = np.full((heads, 16 * PANELS), np.nan, np.float32)
    panel_nbytes = panels.nbytes // PANELS
    multiply(panels.ctypes.data, panel_nbytes, weights.ctypes.data, weights.strides[0], heads, out.ctypes.data)
    return out


def _panels_function(code: KvCode) -> Callable[..., None]:
    def run(panels: int, panel_nbytes: int, weights: int, nbytes: int, heads: int, out: int) -> None:
        multiply_panels(code, panels, panel_nbytes, PANELS, ROWS, weights, nbytes, heads, out, 64 * PANELS, False, 0)

    compiled: Callable[..., None] = entry()(run)
    return compiled


@pytest.mark.parametrize("format", ["fp32", "fp16", "bf16", "fp8_e4m3"])
def test_sums_of_any_number_of_heads(format: str) -> None:
    generator = np.random.default_rng(2)
    weights = generator.standard_normal((MOST_HEADS, ROWS)).astype(np.float32)
    if format == "fp8_e4m3":
        # Every code but the two of a NaN.
        stored = torch.from_numpy(np.resize(np.arange(256, dtype=np.uint8), (PANELS, ROWS, 16)))
        stored[(stored & 0x7F) == 0x7F] = 0
        numbers = stored.view(torch.float8_e4m3fn).double().numpy() / FP8_FACTOR
    else:
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[format]
        stored = torch.from_numpy(generator.standard_normal((PANELS, ROWS, 16))).to(dtype)
        numbers = stored.double().numpy()
    panels = stored.view(torch.uint8).numpy()
    exact = np.einsum("hr,prl->hpl", weights.astype(np.float64), numbers).reshape(MOST_HEADS, -1)
    code = KvCode(format)
    functions = [_panels_function(each) for each in {code, *_narrower(code)}]
    for heads in (1, 2, 4, 7, 15):
        found = _sums(functions[0], panels, weights, heads)
        assert np.abs(found - exact[:heads]).max() <= 1e-5 * np.abs(exact).max()
        for other in functions[1:]:
            assert np.array_equal(_sums(other, panels, weights, heads), found)


def _rounded(weights: Floats) -> Floats:
    out = np.zeros_like(weights)

    def run(rows: int, count: int, heads: int, out: int, nbytes: int) -> None:
        round_rows(rows, count, heads, out, nbytes)

    entry()(run)(weights.ctypes.data, weights.shape[1], len(weights), out.ctypes.data, weights.strides[0])
    return out


def test_int8_sums_do_not_depend_on_the_tile() -> None:
    generator = np.random.default_rng(3)
    codes = generator.integers(-127, 128, (PANELS, 72, 16)).astype(np.int8)
    weights = _rounded(generator.standard_normal((MOST_HEADS, 80)).astype(np.float32))
    panels = np.ascontiguousarray(codes.reshape(PANELS, 36, 2, 16).swapaxes(2, 3))

    def compiled(code: KvCode) -> Callable[..., None]:
        def run(panels: int, panel_nbytes: int, weights: int, nbytes: int, heads: int, out: int) -> None:
            multiply_int8_panels(code, panels, panel_nbytes, PANELS, 72, weights, nbytes, heads, out, 64 * PANELS,
                                 False, panels)  # fmt: skip

        function: Callable[..., None] = entry()(run)
        return function

    code = KvCode("int8")
    functions = [compiled(each) for each in {code, *_narrower(code)[:1]}]
    whole, scales = weights.view(np.int16)[:, :72].astype(np.int64), weights[:, -1]
    exact = np.einsum("hr,prl->hpl", whole, codes.astype(np.int64)).reshape(MOST_HEADS, -1)
    for heads in (1, 2, 4, 7, 15):
        expected = exact[:heads].astype(np.float32) * scales[:heads, None]
        for function in functions:
            assert np.array_equal(_sums(function, panels, weights, heads), expected)


def test_int4_sums_do_not_depend_on_the_tile() -> None:
    generator = np.random.default_rng(4)
    stored = generator.integers(0, 256, (32, 2, 32)).astype(np.uint8)
    weights = _rounded(generator.standard_normal((MOST_HEADS, 80)).astype(np.float32))

    def compiled(code: KvCode) -> Callable[..., None]:
        def run(half: int, weights: int, nbytes: int, heads: int, out: int) -> None:
            add_int4_half(code, half, 64, weights, nbytes, heads, out, 128, half)

        function: Callable[..., None] = entry()(run)
        return function

    code = KvCode("int4")
    functions = [compiled(each) for each in {code, *_narrower(code)[:1]}]
    # [pair][word of 8][row of the pair]: four nibbles each, lane 8 nibble + word.
    words = stored[:, 0].copy().view(np.uint16).reshape(32, 8, 2)
    nibbles = np.stack([words >> (4 * nibble) & 15 for nibble in range(4)], 1)
    codes = nibbles.transpose(0, 3, 1, 2).reshape(64, 32).astype(np.int64)
    expected = (weights.view(np.int16)[:, :64].astype(np.int64) @ codes).astype(np.float32) * weights[:, -1:]
    for heads in (1, 2, 4, 7, 15):
        for function in functions:
            out = np.zeros((heads, 32), np.float32)
            function(stored.ctypes.data, weights.ctypes.data, weights.strides[0], heads, out.ctypes.data)
            assert np.array_equal(out, expected[:heads])


def test_dot_products_do_not_depend_on_the_tile() -> None:
    generator = np.random.default_rng(5)
    panels = generator.standard_normal((PANELS, 8, 16)).astype(np.float32)
    queries = generator.standard_normal((14, 16 * PANELS)).astype(np.float32)

    def compiled(code: KvCode) -> Callable[..., None]:
        def run(panels: int, panel_nbytes: int, queries: int, nbytes: int, heads: int, out: int) -> None:
            dot_panels(code, panels, panel_nbytes, PANELS, 8, queries, nbytes, heads, out, 32)

        function: Callable[..., None] = entry()(run)
        return function

    exact = np.einsum("hpc,ptc->ht", queries.reshape(14, PANELS, 16).astype(np.float64), panels.astype(np.float64))
    code = KvCode("fp32")
    functions = [compiled(each) for each in {code, *_narrower(code)}]
    for heads in (2, 4, 14):
        results = []
        for function in functions:
            out = np.full((heads, 8), np.nan, np.float32)
            place = queries.ctypes.data, queries.strides[0], heads, out.ctypes.data
            function(panels.ctypes.data, panels.strides[0], *place)
            results.append(out)
        assert np.abs(results[0] - exact[:heads]).max() <= 1e-5 * np.abs(exact).max()
        assert all(np.array_equal(out, results[0]) for out in results[1:])
