# mypy: allow-untyped-calls
"""Vectors over the 16 rows of a tile, for the packer: one Numba type, 16 lanes of 32 bits, and what is done with it.

Lanes hold fp32; where an operation says bits, they hold what it says. Nothing is contracted or reassociated: results
are those of the same operations in numpy's float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import models, register_model

from cpu_kernels.jit import intrinsic
from formats.packed import TILE_ROWS

_I8, _I16, _I32 = (ir.IntType(bits) for bits in (8, 16, 32))
_F32 = ir.FloatType()
_I32_ROWS, _F32_ROWS = ir.VectorType(_I32, TILE_ROWS), ir.VectorType(_F32, TILE_ROWS)

_Codegen = Callable[[Any, Any, Any, Any], Any]


class RowsType(types.Type):
    """Numba's type of a vector over rows."""

    def __init__(self) -> None:
        super().__init__(name="Rows")


rows_type = RowsType()


@register_model(RowsType)
class _RowsModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _F32_ROWS)


def _constant(kind: Any, value: int | float) -> Any:
    return ir.Constant(kind, [value] * TILE_ROWS)


def _call(builder: Any, name: str, *arguments: Any, result: Any = _F32_ROWS) -> Any:
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def _bits(builder: Any, rows: Any) -> Any:
    return builder.bitcast(rows, _I32_ROWS)


def _rows(builder: Any, bits: Any) -> Any:
    return builder.bitcast(bits, _F32_ROWS)


def _magnitude(builder: Any, rows: Any) -> Any:
    return builder.and_(_bits(builder, rows), _constant(_I32_ROWS, 0x7FFFFFFF))


def _store(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _nearest(builder: Any, rows: Any) -> Any:
    return _call(builder, "llvm.rint.v16f32", rows)


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _to_codes(builder: Any, values: Any) -> Any:
    return builder.fptosi(values, _I32_ROWS)


@intrinsic
def rows_load(typingctx: Any, address: Any) -> tuple[Any, _Codegen]:
    """16 fp32 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], _F32_ROWS.as_pointer()), align=4)

    return rows_type(types.int64), codegen


@intrinsic
def rows_splat(typingctx: Any, value: Any) -> tuple[Any, _Codegen]:
    """One value in all lanes."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        undefined = ir.Constant(_F32_ROWS, ir.Undefined)
        first = builder.insert_element(undefined, arguments[0], ir.Constant(_I32, 0))
        return builder.shuffle_vector(first, undefined, _constant(_I32_ROWS, 0))

    return rows_type(types.float32), codegen


def _binary(name: str, build: Callable[[Any, Any, Any], Any], doc: str) -> Any:
    def operation(typingctx: Any, a: Any, b: Any) -> tuple[Any, _Codegen]:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return build(builder, arguments[0], arguments[1])

        return rows_type(rows_type, rows_type), codegen

    operation.__name__ = operation.__qualname__ = name
    operation.__doc__ = doc
    return intrinsic(operation)


rows_multiply = _binary("rows_multiply", lambda builder, a, b: builder.fmul(a, b), "a b.")
rows_divide = _binary("rows_divide", lambda builder, a, b: builder.fdiv(a, b), "a / b.")
rows_add_square = _binary(
    "rows_add_square", lambda builder, a, b: builder.fadd(a, builder.fmul(b, b)), "a + round(b b)."
)
rows_larger = _binary(
    "rows_larger",
    lambda builder, a, b: _rows(
        builder,
        builder.select(
            builder.icmp_unsigned(">", _magnitude(builder, b), _bits(builder, a)),
            _magnitude(builder, b),
            _bits(builder, a),
        ),
    ),
    "max(a, |b|) for a >= 0; a NaN is larger than all.",
)


@intrinsic
def rows_subtract_product(typingctx: Any, a: Any, b: Any, c: Any) -> tuple[Any, _Codegen]:
    """The difference a - round(b c)."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, c = arguments
        return builder.fsub(a, builder.fmul(b, c))

    return rows_type(rows_type, rows_type, rows_type), codegen


@intrinsic
def rows_where_less(typingctx: Any, a: Any, b: Any, chosen: Any, other: Any) -> tuple[Any, _Codegen]:
    """`chosen` where a < b, `other` elsewhere."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, chosen, other = arguments
        return builder.select(builder.fcmp_ordered("<", a, b), chosen, other)

    return rows_type(rows_type, rows_type, rows_type, rows_type), codegen


@intrinsic
def rows_largest(typingctx: Any, rows: Any) -> tuple[Any, _Codegen]:
    """The largest of 16 values from `rows_larger`; NaN if one is."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = _call(builder, "llvm.vector.reduce.umax.v16i32", _bits(builder, arguments[0]), result=_I32)
        return builder.bitcast(bits, _F32)

    return types.float32(rows_type), codegen


@intrinsic
def rows_round_to_bf16(typingctx: Any, rows: Any) -> tuple[Any, _Codegen]:
    """Finite values rounded to the nearest bf16, ties to even."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = _bits(builder, arguments[0])
        odd = builder.and_(builder.lshr(bits, _constant(_I32_ROWS, 16)), _constant(_I32_ROWS, 1))
        rounded = builder.add(builder.add(bits, _constant(_I32_ROWS, 0x7FFF)), odd)
        return _rows(builder, builder.and_(rounded, _constant(_I32_ROWS, 0xFFFF0000)))

    return rows_type(rows_type), codegen


@intrinsic
def rows_power_of_two(typingctx: Any, rows: Any) -> tuple[Any, _Codegen]:
    """The largest power of two that is not above the magnitude, of normal values."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _rows(builder, builder.and_(_bits(builder, arguments[0]), _constant(_I32_ROWS, 0x7F800000)))

    return rows_type(rows_type), codegen


@intrinsic
def rows_nearest_integer(typingctx: Any, rows: Any, low: Any, high: Any) -> tuple[Any, _Codegen]:
    """The nearest integer from `low` to `high`, ties to even."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, low, high = arguments
        value = _nearest(builder, rows)
        value = builder.select(builder.fcmp_ordered(">", value, low), value, low)
        return _smaller(builder, value, high)

    return rows_type(rows_type, rows_type, rows_type), codegen


def _with_sign(builder: Any, code: Any, bits: Any, position: int) -> Any:
    """The code of a magnitude with the sign of fp32 bits; zero has no sign."""
    zero = _constant(_I32_ROWS, 0)
    sign = builder.shl(builder.lshr(bits, _constant(_I32_ROWS, 31)), _constant(_I32_ROWS, position))
    return builder.or_(code, builder.select(builder.icmp_unsigned("==", code, zero), zero, sign))


def _e2m1_magnitude_code(builder: Any, rows: Any) -> Any:
    """Codes 0 to 7, as fp32, of the nearest e2m1 magnitudes, ties to even; see `formats.pack`."""
    magnitude = _rows(builder, _magnitude(builder, rows))
    code = _nearest(builder, builder.fmul(magnitude, _constant(_F32_ROWS, 2.0)))
    code = _smaller(builder, code, builder.fadd(_nearest(builder, magnitude), _constant(_F32_ROWS, 2.0)))
    half = builder.fmul(magnitude, _constant(_F32_ROWS, 0.5))
    code = _smaller(builder, code, builder.fadd(_nearest(builder, half), _constant(_F32_ROWS, 4.0)))
    return _smaller(builder, code, _constant(_F32_ROWS, 7.0))


@intrinsic
def rows_nearest_e2m1(typingctx: Any, rows: Any) -> tuple[Any, _Codegen]:
    """The nearest e2m1 value, from -6 to 6."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = _e2m1_magnitude_code(builder, arguments[0])
        value = builder.fmul(code, _constant(_F32_ROWS, 0.5))
        for slope, start in ((1.0, -2.0), (2.0, -8.0)):
            line = builder.fadd(builder.fmul(code, _constant(_F32_ROWS, slope)), _constant(_F32_ROWS, start))
            value = builder.select(builder.fcmp_ordered(">", value, line), value, line)
        sign = builder.and_(_bits(builder, arguments[0]), _constant(_I32_ROWS, 0x80000000))
        return _rows(builder, builder.or_(_bits(builder, value), sign))

    return rows_type(rows_type), codegen


@intrinsic
def rows_e2m1_code(typingctx: Any, rows: Any) -> tuple[Any, _Codegen]:
    """Bits: the code of the nearest e2m1 value; zero has no sign."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = _to_codes(builder, _e2m1_magnitude_code(builder, arguments[0]))
        return _rows(builder, _with_sign(builder, code, _bits(builder, arguments[0]), 3))

    return rows_type(rows_type), codegen


@intrinsic
def rows_integer_code(typingctx: Any, rows: Any, offset: Any) -> tuple[Any, _Codegen]:
    """Bits: the code value + offset of integer values."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _rows(builder, _to_codes(builder, builder.fadd(arguments[0], arguments[1])))

    return rows_type(rows_type, rows_type), codegen


@intrinsic
def rows_e4m3_code(typingctx: Any, rows: Any) -> tuple[Any, _Codegen]:
    """Bits: the code of the nearest e4m3 value of magnitudes up to 448, ties to even; zero has no sign."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def constant(value: int) -> Any:
            return _constant(_I32_ROWS, value)

        bits, magnitude = _bits(builder, arguments[0]), _magnitude(builder, arguments[0])
        odd = builder.and_(builder.lshr(magnitude, constant(20)), constant(1))
        rounded = builder.lshr(builder.add(builder.add(magnitude, constant(0x7FFFF)), odd), constant(20))
        normal = builder.sub(rounded, constant(120 << 3))
        scaled = builder.fmul(_rows(builder, magnitude), _constant(_F32_ROWS, 512.0))
        is_normal = builder.icmp_unsigned(">=", magnitude, constant(121 << 23))
        zero = _constant(_F32_ROWS, 0.0)
        denormal = _to_codes(builder, _nearest(builder, builder.select(is_normal, zero, scaled)))
        code = builder.select(is_normal, normal, denormal)
        return _rows(builder, _with_sign(builder, code, bits, 7))

    return rows_type(rows_type), codegen


@intrinsic
def rows_with_code(typingctx: Any, bits: Any, code: Any, shift: Any) -> tuple[Any, _Codegen]:
    """Bits: `bits` | `code` << shift."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, code, shift = arguments
        shift = builder.trunc(shift, _I32)
        undefined = ir.Constant(_I32_ROWS, ir.Undefined)
        first = builder.insert_element(undefined, shift, ir.Constant(_I32, 0))
        shifts = builder.shuffle_vector(first, undefined, _constant(_I32_ROWS, 0))
        return _rows(builder, builder.or_(_bits(builder, bits), builder.shl(_bits(builder, code), shifts)))

    return rows_type(rows_type, rows_type, types.int64), codegen


def _storing(name: str, element: Any, shift: int, doc: str) -> Any:
    def operation(typingctx: Any, address: Any, bits: Any) -> tuple[Any, _Codegen]:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            bits = _bits(builder, arguments[1])
            if shift:
                bits = builder.lshr(bits, _constant(_I32_ROWS, shift))
            if element is not _I32:
                bits = builder.trunc(bits, ir.VectorType(element, TILE_ROWS))
            _store(builder, arguments[0], bits)
            return context.get_dummy_value()

        return types.void(types.int64, rows_type), codegen

    operation.__name__ = operation.__qualname__ = name
    operation.__doc__ = doc
    return intrinsic(operation)


rows_store = _storing("rows_store", _I32, 0, "Store 64 bytes.")
rows_store_bf16 = _storing("rows_store_bf16", _I16, 16, "Store 16 bf16 from values that are bf16: 32 bytes.")
rows_store_e8m0 = _storing("rows_store_e8m0", _I8, 23, "Store 16 e8m0 from powers of two: 16 bytes.")
