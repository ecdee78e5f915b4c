# mypy: allow-untyped-calls
"""Register tiles of VDPBF16PS with a lane for each of 16 tokens: rows of bf16 weights times panels of activations.

A panel holds 16 tokens as [columns / 2, 16, 2] bf16: one vector register has two columns of all of them, beside each
other in a lane. Two columns of a row-major weight matrix are four bytes as they lie, and are broadcast to all lanes:
nothing is widened or moved. Eight rows by three panels take 24 of 32 registers for sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from cpu_kernels.jit import intrinsic, stack_room
from cpu_kernels.panel_simd import MOST_ROWS
from cpu_kernels.simd import BF16X32, LANES, TileShape, TileType, pointer_to

PAIR_BYTES = 4 * LANES
"""Two columns of a panel."""

DEPTH = 512
"""Columns that pass all panels of a block of rows before the next do: 16 KiB of a panel."""

NEAR_ROW_BYTES = 2 * DEPTH + 64
"""From a row of weights at hand to the next: rows as they lie are often multiples of 4 KiB apart, so that eight of them
would push each other, and panels, out of the first-level cache."""

WIDE_TILE = TileShape(rows=8, tokens=3, chains=1)
"""Here and below tokens are panels of 16."""

MIDDLE_TILE = TileShape(rows=8, tokens=2, chains=1)
NARROW_TILE = TileShape(rows=8, tokens=1, chains=1)
ROW_TILE = TileShape(rows=1, tokens=1, chains=1)

_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_F32X16 = ir.VectorType(ir.FloatType(), LANES)
_I32X16 = ir.VectorType(_I32, LANES)
_ALIGNMENT_BYTES = 64
_Codegen = Callable[[Any, Any, Any, Any], Any]


def _offset(builder: Any, address: Any, stride: Any, count: int) -> Any:
    return builder.add(address, builder.mul(stride, ir.Constant(_I64, count))) if count else address


def _weights(builder: Any, address: Any, *, single: bool) -> Any:
    """Two columns of a row, or the last one and zero, in all lanes."""
    stored = builder.load(pointer_to(builder, address, _I16 if single else _I32), align=2)
    pair = builder.zext(stored, _I32) if single else stored
    undefined = ir.Constant(_I32X16, ir.Undefined)
    one = builder.insert_element(undefined, pair, ir.Constant(_I32, 0))
    return builder.bitcast(builder.shuffle_vector(one, undefined, ir.Constant(_I32X16, [0] * LANES)), BF16X32)


def _add(builder: Any, shape: TileShape, arguments: Any, *, single: bool) -> Any:
    sums, weights, columns, stride = arguments
    kind = ir.FunctionType(_F32X16, [_F32X16, BF16X32, BF16X32])
    dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    panels = [
        builder.load(pointer_to(builder, _offset(builder, columns, stride, panel), BF16X32), align=_ALIGNMENT_BYTES)
        for panel in range(shape.tokens)
    ]
    for row in range(shape.rows):
        weight = _weights(builder, builder.add(weights, ir.Constant(_I64, row * NEAR_ROW_BYTES)), single=single)
        for panel in range(shape.tokens):
            index = row * shape.tokens + panel
            total = builder.call(dot, [builder.extract_value(sums, index), panels[panel], weight])
            sums = builder.insert_value(sums, total, index)
    return sums


@intrinsic
def near_weights(typingctx: Any) -> tuple[Any, _Codegen]:
    """Address of room for a tile's rows of DEPTH weights on the stack of the calling function."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return stack_room(builder, WIDE_TILE.rows * NEAR_ROW_BYTES, _ALIGNMENT_BYTES)

    return types.int64(), codegen


@intrinsic
def tile_add_pair(typingctx: Any, tile: Any, weights: Any, columns: Any, stride: Any) -> tuple[Any, _Codegen]:
    """Add the products of two columns: of each row's two weights with those of each panel's 16 tokens.

    weights: address of the first row's two weights, NEAR_ROW_BYTES before the next row's.
    columns: address of the two columns in the first panel, stride bytes before those in the next.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _add(builder, tile.shape, arguments, single=False)

    return tile(tile, types.int64, types.int64, types.int64), codegen


@intrinsic
def tile_add_last(typingctx: Any, tile: Any, weights: Any, columns: Any, stride: Any) -> tuple[Any, _Codegen]:
    """As `tile_add_pair` for the last of an odd number of columns: nothing behind it is read."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _add(builder, tile.shape, arguments, single=True)

    return tile(tile, types.int64, types.int64, types.int64), codegen


def _places(builder: Any, shape: TileShape, panels: Any, stride: Any) -> list[Any]:
    """Pointers to the 16 sums of each row in each panel, in the tile's order."""
    row_bytes = ir.Constant(_I64, 4 * LANES)
    return [
        pointer_to(builder, _offset(builder, _offset(builder, panels, stride, panel), row_bytes, row), _F32X16)
        for row in range(shape.rows)
        for panel in range(shape.tokens)
    ]


@intrinsic
def tile_load(typingctx: Any, shape: Any, panels: Any, stride: Any) -> tuple[Any, _Codegen]:
    """The sums of so many rows of panels of fp32 [rows, 16].

    panels: address of the first row's sums in the first panel, stride bytes before those in the next.
    """
    tile = TileType(shape.shape)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = ir.Constant(context.get_value_type(tile), ir.Undefined)
        for index, place in enumerate(_places(builder, tile.shape, *arguments[1:])):
            value = builder.insert_value(value, builder.load(place, align=_ALIGNMENT_BYTES), index)
        return value

    return tile(shape, types.int64, types.int64), codegen


@intrinsic
def tile_save(typingctx: Any, tile: Any, panels: Any, stride: Any) -> tuple[Any, _Codegen]:
    """Where `tile_load` takes them from."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, panels, stride = arguments
        for index, place in enumerate(_places(builder, tile.shape, panels, stride)):
            builder.store(builder.extract_value(value, index), place, align=_ALIGNMENT_BYTES)
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64), codegen


@intrinsic
def activated_rows(typingctx: Any) -> tuple[Any, _Codegen]:
    """Address of room for 16 bf16 numbers of each of MOST_ROWS rows on the stack of the calling function."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return stack_room(builder, MOST_ROWS * PAIR_BYTES // 2, _ALIGNMENT_BYTES)

    return types.int64(), codegen


@intrinsic
def put_pair(typingctx: Any, first: Any, second: Any, columns: Any) -> tuple[Any, _Codegen]:
    """Two columns of a panel from two rows of 16 bf16 numbers; the second is zero where its address is 0.

    columns: address of the two columns.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, second, columns = arguments
        kind = ir.VectorType(_I16, LANES)
        low = builder.load(pointer_to(builder, first, kind), align=2)
        address = builder.select(builder.icmp_signed("!=", second, ir.Constant(_I64, 0)), second, first)
        found = builder.load(pointer_to(builder, address, kind), align=2)
        high = builder.select(builder.icmp_signed("!=", second, ir.Constant(_I64, 0)), found, ir.Constant(kind, None))
        order = [lane + LANES * column for lane in range(LANES) for column in range(2)]
        both = builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, 2 * LANES), order))
        builder.store(both, pointer_to(builder, columns, both.type), align=_ALIGNMENT_BYTES)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def write_square(typingctx: Any, sums: Any, addresses: Any, offset: Any, tokens: Any) -> tuple[Any, _Codegen]:
    """16 rows of fp32 sums of up to 16 tokens to these tokens' outputs: a square turned over in registers.

    sums: address of fp32 [16, 16], row by row. addresses: address of a table of int64, the address of each output.
    offset: bytes from there to the first row's number. tokens: how many are written.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, addresses, offset, tokens = arguments
        vectors = [
            builder.load(pointer_to(builder, builder.add(sums, ir.Constant(_I64, 4 * LANES * row)), _F32X16), align=64)
            for row in range(LANES)
        ]
        # Each round interleaves vectors half of the square apart: one bit of a row's number becomes one of a lane's.
        for _ in range(4):
            halves = []
            for row in range(LANES // 2):
                pair = vectors[row], vectors[row + LANES // 2]
                for start in (0, LANES // 2):
                    order = [lane + LANES * half for lane in range(start, start + LANES // 2) for half in range(2)]
                    halves.append(builder.shuffle_vector(*pair, ir.Constant(_I32X16, order)))
            vectors = halves
        for token in range(LANES):
            with builder.if_then(builder.icmp_signed("<", ir.Constant(_I64, token), tokens), likely=True):
                place = builder.add(addresses, ir.Constant(_I64, 8 * token))
                output = builder.add(builder.load(pointer_to(builder, place, _I64)), offset)
                builder.store(vectors[token], pointer_to(builder, output, _F32X16), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen
