# mypy: allow-untyped-defs, allow-untyped-calls
"""Weighted sums of the rows of panels for any number of heads, and panels widened to fp32."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from cpu_kernels.cache_lines import prefetch
from cpu_kernels.jit import inner, intrinsic
from cpu_kernels.kv_simd import (
    KvCode,
    PanelShape,
    dot_four,
    dot_two,
    expand_rows_at_once,
    has_many_registers,
    panel_add,
    panel_four_rows,
    panel_row,
    panel_store,
    panel_zero,
)
from cpu_kernels.kv_vectors import offset_by

_ONE_BY_ONE, _ONE_BY_FOUR = PanelShape(1, 1), PanelShape(1, 4)
_TWO_BY_ONE, _TWO_BY_TWO = PanelShape(2, 1), PanelShape(2, 2)
_FOUR_BY_ONE, _EIGHT_BY_ONE = PanelShape(4, 1), PanelShape(8, 1)


@intrinsic
def row_nbytes(typingctx: Any, code: Any) -> Any:
    """Bytes of a panel's row, as a constant."""
    kernel: KvCode = code.code

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(64), kernel.row_nbytes)

    return types.int64(code), codegen


@intrinsic
def rows_at_once(typingctx: Any, code: Any) -> Any:
    """Rows that lie together, as a constant."""
    kernel: KvCode = code.code

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(64), 2 if kernel.has_pairs else 1)

    return types.int64(code), codegen


@intrinsic
def _prefetch_like(typingctx: Any, code: Any, shape: Any, address: Any) -> Any:
    """Ask for as many bytes as four rows of a tile have; they need not exist."""
    lines = 4 * code.code.row_nbytes * shape.shape.panels // 64

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for line in range(lines):
            prefetch(builder, offset_by(builder, arguments[2], 64 * line))
        return context.get_dummy_value()

    return types.void(code, shape, types.int64), codegen


@intrinsic
def _panels_of(typingctx: Any, shape: Any) -> Any:
    """Panels of a tile, as a constant."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(64), shape.shape.panels)

    return types.int64(shape), codegen


@inner
def _tile(code, shape, panel, panel_nbytes, rows, weights, weights_nbytes, out, out_nbytes, add, ahead, ahead_step):
    step = row_nbytes(code)
    tile = panel_zero(code, shape)
    full = rows // 4 * 4
    for row in range(0, full, 4):
        here = panel + row * step
        _prefetch_like(code, shape, ahead + row * ahead_step)
        tile = panel_four_rows(code, tile, here, panel_nbytes, weights + 4 * row, weights_nbytes)
    for row in range(full, rows):
        tile = panel_row(code, tile, panel + row * step, panel_nbytes, weights + 4 * row, weights_nbytes)
    if add:
        panel_add(code, tile, out, out_nbytes)
    else:
        panel_store(code, tile, out, out_nbytes)


@inner
def _sweep(code, shape, panels, panel_nbytes, first, count, rows, weights, weights_nbytes, out, out_nbytes, add, ahead):
    """Whole tiles of a shape from panel `first` on; returns the panel after them."""
    width = _panels_of(shape)
    panel = first
    while panel + width <= count:
        offset = panel * panel_nbytes
        _tile(code, shape, panels + offset, panel_nbytes, rows, weights, weights_nbytes, out + 64 * panel, out_nbytes,
              add, ahead + offset, width * row_nbytes(code))  # fmt: skip
        panel += width
    return panel


@inner
def multiply_panels(
    code, panels, panel_nbytes, count, rows, weights, weights_nbytes, heads, out, out_nbytes, add, ahead
):
    """Out[h][16 p + lane] = sum over r < rows of weights[h][r] panel p's [r][lane]; added to what is there if `add`.

    panels: address of `count` panels, panel_nbytes apart. weights: address of fp32 [heads][rows], weights_nbytes
    apart. out: address of fp32 [heads][16 count], out_nbytes apart. ahead: address of what is read next, of which as
    many bytes are asked for.
    """
    head = 0
    while head < heads:
        left = heads - head
        at, target = weights + head * weights_nbytes, out + head * out_nbytes
        if has_many_registers(code) and left >= 8:
            _sweep(code, _EIGHT_BY_ONE, panels, panel_nbytes, 0, count, rows, at, weights_nbytes, target, out_nbytes,
                   add, ahead)  # fmt: skip
            head += 8
        elif left >= 4:
            _sweep(code, _FOUR_BY_ONE, panels, panel_nbytes, 0, count, rows, at, weights_nbytes, target, out_nbytes,
                   add, ahead)  # fmt: skip
            head += 4
        elif left >= 2:
            done = _sweep(code, _TWO_BY_TWO, panels, panel_nbytes, 0, count, rows, at, weights_nbytes, target,
                          out_nbytes, add, ahead)  # fmt: skip
            _sweep(code, _TWO_BY_ONE, panels, panel_nbytes, done, count, rows, at, weights_nbytes, target, out_nbytes,
                   add, ahead)  # fmt: skip
            head += 2
        else:
            done = _sweep(code, _ONE_BY_FOUR, panels, panel_nbytes, 0, count, rows, at, weights_nbytes, target,
                          out_nbytes, add, ahead)  # fmt: skip
            _sweep(code, _ONE_BY_ONE, panels, panel_nbytes, done, count, rows, at, weights_nbytes, target, out_nbytes,
                   add, ahead)  # fmt: skip
            head += 1


@inner
def expand_rows(code, rows, count, out, out_nbytes):
    """Write `count` rows of a panel as fp32, out_nbytes from row to row; where rows lie in pairs, of the last both."""
    step = rows_at_once(code)
    for row in range(0, count, step):
        expand_rows_at_once(code, rows + row * row_nbytes(code), out + row * out_nbytes, out_nbytes)


@inner
def dot_panels(code, panels, panel_nbytes, count, tokens, queries, query_nbytes, heads, out, out_nbytes):
    """Out[h][t] = sum over channels of queries[h][c] panels' [c / 16][t][c mod 16].

    code: of fp32. tokens: a multiple of 4. heads: a multiple of 2. The other arguments are those of `dot_two`.
    """
    head = 0
    while head < heads:
        at, target = queries + head * query_nbytes, out + head * out_nbytes
        if has_many_registers(code) and heads - head >= 4:
            for token in range(0, tokens, 4):
                dot_four(panels + 64 * token, panel_nbytes, count, at, query_nbytes, target + 4 * token, out_nbytes)
            head += 4
        else:
            for token in range(0, tokens, 4):
                dot_two(panels + 64 * token, panel_nbytes, count, at, query_nbytes, target + 4 * token, out_nbytes)
            head += 2
