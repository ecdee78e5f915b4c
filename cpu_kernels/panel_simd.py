# mypy: allow-untyped-calls
"""Register tiles with a lane for each of 16 tokens: a few rows of fp32 weights times one panel of activations.

A panel holds 16 tokens as fp32 [columns, 16], so that one vector register has a column of all of them and weights are
broadcast one by one. Weights stay row-major: nothing but their width changes before they are multiplied. The sums of a
tile and a column of the panel fill the registers: on AVX2 6 rows take 12 of 16, with AVX-512 12 rows take 12 of 32.
A panel with at most 8 tokens is multiplied by a tile of half as many lanes and twice 6 rows, in as many registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from cpu_kernels.isa import Isa
from cpu_kernels.jit import intrinsic, stack_room
from cpu_kernels.simd import LANES, TileShape, pointer_to

DEPTH = 128
"""Columns that are multiplied at a time: the weights of a tile and a panel of so many stay in the first-level cache."""

PANEL_COLUMN_BYTES = 4 * LANES

ROWS_TOGETHER = 12
"""Rows whose weights are widened at a time: a multiple of what every tile has."""

MOST_ROWS = 96
"""Rows of a chunk: many against the packing of their weights, few against a phase."""

HALF_LANES = LANES // 2

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_F32X16 = ir.VectorType(_F32, LANES)
_F32X8 = ir.VectorType(_F32, HALF_LANES)
_ALIGNMENT_BYTES = 64
_Codegen = Callable[[Any, Any, Any, Any], Any]


# Vectors of 16 sums; in one of half as many lanes, of two rows each.
HALF_TILE = TileShape(rows=ROWS_TOGETHER // 2, tokens=1, chains=1)


def tile_shape(isa: Isa) -> TileShape:
    """The tile whose sums fill the registers of an ISA."""
    return TileShape(rows=ROWS_TOGETHER if isa.startswith("avx512") else ROWS_TOGETHER // 2, tokens=1, chains=1)


@intrinsic
def rows_of_tile(typingctx: Any, shape: Any) -> tuple[Any, _Codegen]:
    """Weight rows of a tile, as a constant."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_I64, shape.shape.rows)

    return types.int64(shape), codegen


def _shuffle(builder: Any, first: Any, second: Any, lanes: Sequence[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))


def _broadcast(builder: Any, kind: Any, address: Any, row: int) -> Any:
    """The weight of a row, in all lanes."""
    at = builder.add(address, ir.Constant(_I64, 4 * DEPTH * row))
    weight = builder.load(pointer_to(builder, at, _F32), align=4)
    undefined = ir.Constant(kind, ir.Undefined)
    return _shuffle(
        builder, builder.insert_element(undefined, weight, ir.Constant(_I32, 0)), undefined, [0] * kind.count
    )


def _fma(builder: Any, *operands: Any) -> Any:
    kind = ir.FunctionType(_F32X16, [_F32X16] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32"), operands)


@intrinsic
def wide_weights(typingctx: Any) -> tuple[Any, _Codegen]:
    """Address of fp32 [ROWS_TOGETHER, DEPTH] on the stack of the calling function."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return stack_room(builder, 4 * ROWS_TOGETHER * DEPTH, _ALIGNMENT_BYTES)

    return types.int64(), codegen


@intrinsic
def tile_add_column(typingctx: Any, tile: Any, weights: Any, column: Any) -> tuple[Any, _Codegen]:
    """Add the products of one column: of each row's weight with 16 activations.

    weights: address of the first row's weight of this column, as fp32; DEPTH weights before the next row's.
    column: address of the 16 activations.
    """
    shape = tile.shape

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, weights, column = arguments
        x = builder.load(pointer_to(builder, column, _F32X16), align=_ALIGNMENT_BYTES)
        for row in range(shape.rows):
            weight = _broadcast(builder, _F32X16, weights, row)
            total = _fma(builder, weight, x, builder.extract_value(sums, row))
            sums = builder.insert_value(sums, total, row)
        return sums

    return tile(tile, types.int64, types.int64), codegen


@intrinsic
def half_tile_add_column(typingctx: Any, tile: Any, weights: Any, column: Any) -> tuple[Any, _Codegen]:
    """As `tile_add_column` for ROWS_TOGETHER rows and the first 8 activations; arguments as there."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, weights, column = arguments
        half = builder.load(pointer_to(builder, column, _F32X8), align=_ALIGNMENT_BYTES // 2)
        x = _shuffle(builder, half, half, [*range(HALF_LANES)] * 2)
        for pair in range(tile.shape.rows):
            low, high = (_broadcast(builder, _F32X8, weights, 2 * pair + row) for row in range(2))
            weight = _shuffle(builder, low, high, range(LANES))
            total = _fma(builder, weight, x, builder.extract_value(sums, pair))
            sums = builder.insert_value(sums, total, pair)
        return sums

    return tile(tile, types.int64, types.int64), codegen


@intrinsic
def tile_put(typingctx: Any, tile: Any, panel: Any, rows: Any, first: Any) -> tuple[Any, _Codegen]:
    """Put the sums of the tile's first `rows` rows into a panel, or add them to what is there unless `first`.

    panel: address of the sums of the tile's first row, 16 fp32; those of the next rows follow.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, panel, rows, first = arguments
        for row in range(tile.shape.rows):
            _put_row(builder, builder.extract_value(sums, row), panel, row, rows, first)
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64, types.boolean), codegen


@intrinsic
def half_tile_put(typingctx: Any, tile: Any, panel: Any, rows: Any, first: Any) -> tuple[Any, _Codegen]:
    """As `tile_put` for a tile of half as many lanes; the others become zero."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, panel, rows, first = arguments
        zero = ir.Constant(_F32X16, None)
        for pair in range(tile.shape.rows):
            both = builder.extract_value(sums, pair)
            for row, start in ((2 * pair, 0), (2 * pair + 1, HALF_LANES)):
                lanes = [*range(start, start + HALF_LANES), *range(LANES, LANES + HALF_LANES)]
                _put_row(builder, _shuffle(builder, both, zero, lanes), panel, row, rows, first)
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64, types.boolean), codegen


def _put_row(builder: Any, total: Any, panel: Any, row: int, rows: Any, first: Any) -> None:
    with builder.if_then(builder.icmp_signed("<", ir.Constant(_I64, row), rows), likely=True):
        at = builder.add(panel, ir.Constant(_I64, PANEL_COLUMN_BYTES * row))
        pointer = pointer_to(builder, at, _F32X16)
        with builder.if_else(first) as (fresh, later):
            with fresh:
                builder.store(total, pointer, align=_ALIGNMENT_BYTES)
            with later:
                so_far = builder.load(pointer, align=_ALIGNMENT_BYTES)
                builder.store(builder.fadd(so_far, total), pointer, align=_ALIGNMENT_BYTES)
