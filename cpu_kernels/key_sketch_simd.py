# mypy: allow-untyped-calls
"""Code for scores of keys that are known by a sketch (`formats.key_sketch`): sums of looked-up sums of four channels.

A row's weights are query times spread, rounded to integers; a table has the sums of four channels' weights for each of
the 16 values of their bits, made positive by what the negative ones add up to. Two tables, one in each half of a
vector, are made together. What is looked up is at most 127, so that two of them add up in a byte; sums over all
channels are of 16 bits. All is exact: bits depend neither on the instruction set nor on the order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.core.imputils import lower_constant
from numba.extending import models, register_model, typeof_impl

from cpu_kernels.isa import supports
from cpu_kernels.jit import intrinsic
from cpu_kernels.kv_vectors import load, offset_by, pick, splat
from cpu_kernels.packed_simd import call
from cpu_kernels.packed_simd import splat as splat_lanes
from cpu_kernels.packing_simd import rows_type

LARGEST_LOOKED_UP = 127
TABLES_NBYTES = 256  # of a panel of 64 channels: 16 tables of 16 bytes

_LANES, _FOURS, _PAIRS = 16, 4, 8
_TABLE_NBYTES = 16
_TOKENS = 64
_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_I8X16, _I8X32, _I16X16, _I32X16 = (
    ir.VectorType(kind, lanes) for kind, lanes in ((_I8, 16), (_I8, 32), (_I16, 16), (_I32, 16))
)
_F32X16 = ir.VectorType(_F32, _LANES)


def _bits_of_places(four: int) -> list[int]:
    """Of the 16 places of a table whether one's number has a bit; of the bit after the last, always."""
    return [place >> four & 1 if four < _FOURS else 1 for place in range(_LANES)]


def table_places() -> npt.NDArray[np.uint8]:
    """Which lanes make up the tables, uint8 [8][5][32].

    For each two tables that are made together, and for the weights of each of the four channels and what is below zero
    of all four: the lane that each place takes, or 128 for none.
    """
    has = np.array([_bits_of_places(four) for four in range(_FOURS + 1)])
    lanes = np.array([[pair, pair + _PAIRS] for pair in range(_PAIRS)])
    return np.where(has[None, :, None], lanes[:, None, :, None], 128).astype(np.uint8).reshape(_PAIRS, _FOURS + 1, 32)


@dataclass(frozen=True)
class SumsShape:
    """Sums of 64 tokens of some rows, a compile-time constant.

    Attributes:
        rows: that look up with the same places.
        shuffles: whether the CPU looks up bytes in a vector.
    """

    rows: int
    shuffles: bool = field(default_factory=lambda: supports("avx2"))


class SumsShapeType(types.Type):
    """Numba's type of a `SumsShape`: one type per value."""

    def __init__(self, shape: SumsShape) -> None:
        self.shape = shape
        super().__init__(name=f"SumsShape({shape})")


class SumsType(types.Type):
    """Numba's type of the sums: of each row four vectors of 16 words, two each kept as `sums_add` says."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        super().__init__(name=f"SketchSums({rows})")


@typeof_impl.register(SumsShape)
def _typeof_shape(value: SumsShape, context: Any) -> SumsShapeType:
    return SumsShapeType(value)


register_model(SumsShapeType)(models.OpaqueModel)


@lower_constant(SumsShapeType)
def _lower_compile_time_constant(context: Any, builder: Any, ty: Any, value: Any) -> Any:
    return context.get_dummy_value()


@register_model(SumsType)
class _SumsModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: SumsType) -> None:
        super().__init__(dmm, fe_type, ir.ArrayType(_I16X16, 4 * fe_type.rows))


def _store(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _from_bf16(builder: Any, address: Any) -> Any:
    """16 bf16 numbers as fp32."""
    wide = builder.zext(load(builder, address, _I16X16), _I32X16)
    return builder.bitcast(builder.shl(wide, splat(_I32X16, 16)), _F32X16)


def _weights(builder: Any, query: Any, spreads: Any, four: int) -> Any:
    """16 of 64 numbers of a query times as many spreads."""
    numbers = (load(builder, offset_by(builder, at, 4 * _LANES * four), _F32X16) for at in (query, spreads))
    return builder.fmul(*numbers)


@intrinsic
def rows_add_product(typingctx: Any, total: Any, a: Any, b: Any) -> Any:
    """The sum total + a * b, rounded once; a, b: addresses of 16 fp32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total, *at = arguments
        return call(builder, "llvm.fma.v16f32", _F32X16, *(load(builder, one, _F32X16) for one in at), total)

    return rows_type(rows_type, types.int64, types.int64), codegen


@intrinsic
def sizes_of_fours(typingctx: Any, query: Any, spreads: Any) -> Any:
    """Of a panel of 64 channels, the sum of the four magnitudes of the weights of each table.

    query, spreads: addresses of fp32 [64].
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query, spreads = arguments
        total = None
        for four in range(_FOURS):
            size = call(builder, "llvm.fabs.v16f32", _F32X16, _weights(builder, query, spreads, four))
            total = size if total is None else builder.fadd(total, size)
        return total

    return rows_type(types.int64, types.int64), codegen


@intrinsic
def write_tables(typingctx: Any, shape: Any, query: Any, spreads: Any, factor: Any, places: Any, tables: Any) -> Any:
    """Write the tables of a panel of 64 channels; returns the sum of the weights' magnitudes.

    query, spreads: addresses of fp32 [64]. factor: fp32; weights times it are rounded. places: address of TABLE_PLACES.
    tables: address of TABLES_NBYTES.
    """
    kernel: SumsShape = shape.shape

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, query, spreads, factor, places, tables = arguments
        factors, zero = splat_lanes(builder, factor, _LANES), ir.Constant(_I8X16, None)
        weights, below, sizes = [], zero, zero
        for four in range(_FOURS):
            scaled = builder.fmul(_weights(builder, query, spreads, four), factors)
            nearest = call(builder, "llvm.rint.v16f32", _F32X16, scaled)
            weight = builder.trunc(builder.fptosi(nearest, _I32X16), _I8X16)
            negative = builder.sub(zero, weight)
            is_negative = builder.icmp_signed("<", weight, zero)
            below = builder.add(below, builder.select(is_negative, negative, zero))
            sizes = builder.add(sizes, builder.select(is_negative, negative, weight))
            weights.append(weight)
        rows = [pick(builder, one, one, list(range(_LANES)) * 2) for one in (*weights, below)]
        zeros = ir.Constant(_I8X32, None)
        for pair in range(_PAIRS):
            own = [pair] * _LANES + [_LANES + pair + _PAIRS] * _LANES
            table = zeros
            for four, row in enumerate(rows):
                if kernel.shuffles:
                    # As constants they would fill the registers, be stored on the stack and loaded from there.
                    place = load(builder, offset_by(builder, places, 32 * (len(rows) * pair + four)), _I8X32)
                    found = call(builder, "llvm.x86.avx2.pshuf.b", _I8X32, row, place)
                else:
                    found = pick(builder, row, zeros, [
                        lane if has else 2 * _LANES for lane, has in zip(own, _bits_of_places(four) * 2, strict=True)
                    ])  # fmt: skip
                table = builder.add(table, found)
            _store(builder, offset_by(builder, tables, 2 * _TABLE_NBYTES * pair), table)
        total = call(builder, "llvm.vector.reduce.add.v16i32", _I32, builder.zext(sizes, _I32X16))
        return builder.uitofp(total, _F32)

    arguments = types.int64, types.int64, types.float32, types.int64, types.int64
    return types.float32(shape, *arguments), codegen


def _look_up(builder: Any, shape: SumsShape, table: Any, places: list[Any]) -> list[Any]:
    """Of each vector of 32 places the numbers in a table of 16 bytes, given by its address."""
    if shape.shuffles:
        once = load(builder, table, _I8X16)
        twice = pick(builder, once, once, list(range(_LANES)) * 2)
        return [call(builder, "llvm.x86.avx2.pshuf.b", _I8X32, twice, place) for place in places]
    none, zero = load(builder, table, _I8), ir.Constant(_I8X32, None)
    numbers = [splat_lanes(builder, none, 2 * _LANES)] * len(places)
    for four in range(_FOURS):
        number = builder.sub(load(builder, offset_by(builder, table, 1 << four), _I8), none)
        one = splat_lanes(builder, number, 2 * _LANES)
        for index, place in enumerate(places):
            has = builder.icmp_unsigned("!=", builder.and_(place, splat(_I8X32, 1 << four)), zero)
            numbers[index] = builder.add(numbers[index], builder.select(has, one, zero))
    return numbers


@intrinsic
def sums_zero(typingctx: Any, shape: Any) -> Any:
    """Sums of no channel."""
    sums = SumsType(shape.shape.rows)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(context.get_value_type(sums), None)

    return sums(shape), codegen


@intrinsic
def sums_add(typingctx: Any, shape: Any, sums: Any, signs: Any, tables: Any, tables_nbytes: Any) -> Any:
    """Add what a panel's signs look up in its tables.

    Two tokens' bytes make a word: the sum of the words, carries and all, and that of their upper bytes are kept.

    signs: address of a panel's [16][32]. tables: address of the first row's, tables_nbytes before the next row's.
    """
    kernel: SumsShape = shape.shape

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, value, signs, tables, tables_nbytes = arguments
        low, nibble, byte = splat(_I8X32, 15), splat(_I16X16, 4), splat(_I16X16, 8)
        parts = [builder.extract_value(value, place) for place in range(4 * kernel.rows)]
        for pair in range(_PAIRS):
            places = []
            for own in range(2):
                both = load(builder, offset_by(builder, signs, 32 * (2 * pair + own)), _I8X32)
                high = builder.bitcast(builder.lshr(builder.bitcast(both, _I16X16), nibble), _I8X32)
                places.append([builder.and_(both, low), builder.and_(high, low)])
            at = offset_by(builder, tables, 2 * _TABLE_NBYTES * pair)
            for row in range(kernel.rows):
                found = [
                    _look_up(builder, kernel, offset_by(builder, at, _TABLE_NBYTES * own), places[own])
                    for own in range(2)
                ]
                for half, (one, other) in enumerate(zip(*found, strict=True)):
                    words, place = builder.bitcast(builder.add(one, other), _I16X16), 4 * row + 2 * half
                    parts[place] = builder.add(parts[place], words)
                    parts[place + 1] = builder.add(parts[place + 1], builder.lshr(words, byte))
                at = builder.add(at, tables_nbytes)
        for place, part in enumerate(parts):
            value = builder.insert_value(value, part, place)
        return value

    return sums(shape, sums, types.int64, types.int64, types.int64), codegen


@intrinsic
def sums_store(typingctx: Any, sums: Any, out: Any) -> Any:
    """Write the sums at an address: uint16 [rows][64] in the order of a sketch's factors."""
    rows = sums.rows

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, out = arguments
        for place in range(0, 4 * rows, 2):
            words, upper = (builder.extract_value(value, place + part) for part in range(2))
            lower = builder.sub(words, builder.shl(upper, splat(_I16X16, 8)))
            for part, vector in enumerate((lower, upper)):
                _store(builder, offset_by(builder, out, 32 * (place + part)), vector)
        return context.get_dummy_value()

    return types.void(sums, types.int64), codegen


@intrinsic
def largest_deviation(typingctx: Any, sums: Any, total: Any, factors: Any) -> Any:
    """The largest over 64 tokens of factor * (2 sum - total).

    sums: address of uint16 [64]. total: fp32. factors: address of bf16 [64].
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, total, factors = arguments
        totals = splat_lanes(builder, total, _LANES)
        largest = None
        for first in range(0, _TOKENS, _LANES):
            found = builder.zext(load(builder, offset_by(builder, sums, 2 * first), _I16X16), _I32X16)
            twice = builder.sitofp(builder.add(found, found), _F32X16)
            factor = _from_bf16(builder, offset_by(builder, factors, 2 * first))
            deviation = builder.fmul(factor, builder.fsub(twice, totals))
            if largest is None:
                largest = deviation
            else:
                largest = builder.select(builder.fcmp_ordered(">", deviation, largest), deviation, largest)
        return largest

    return rows_type(types.int64, types.float32, types.int64), codegen
