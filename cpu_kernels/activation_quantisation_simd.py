# mypy: allow-untyped-calls
"""Whole blocks of 64 activations in vectors of 16, as functions that the quantisation kernel calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from cpu_kernels import packed_simd as simd
from cpu_kernels.jit import intrinsic
from formats.packed import COLUMN_BLOCK

_Codegen = Callable[[Any, Any, Any, Any], Any]
_LANES = 16
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32S, _I32S = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(_I32, _LANES)
# Added to a number below 2**22 and taken away again, it rounds to the nearest integer, ties to even.
ROUND = 1.5 * 2.0**23


def _load(builder: Any, format: str, address: Any, vector: int) -> Any:
    """Elements 16 vector .. 16 vector + 15 as fp32."""
    if format == "fp32":
        return simd.load(builder, address, _F32S, 4 * _LANES * vector)
    raw = simd.load(builder, address, ir.VectorType(_I16, _LANES), 2 * _LANES * vector)
    if format == "fp16":
        return builder.fpext(builder.bitcast(raw, ir.VectorType(ir.HalfType(), _LANES)), _F32S)
    return builder.bitcast(builder.shl(builder.zext(raw, _I32S), simd.constant(_I32S, 16)), _F32S)


def _reduce(builder: Any, operation: str, values: Any) -> Any:
    return simd.call(builder, f"llvm.vector.reduce.{operation}.v16i32", _I32, values)


@intrinsic
def largest_bits(typingctx: Any, elements: Any, address: Any) -> tuple[Any, _Codegen]:
    """The largest of the bits of |x| as fp32, of 64 elements at an address; not finite from 0x7F800000 on."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        largest = ir.Constant(_I32S, None)
        for vector in range(COLUMN_BLOCK // _LANES):
            bits = builder.bitcast(_load(builder, elements.elements.format, arguments[1], vector), _I32S)
            magnitude = builder.and_(bits, simd.constant(_I32S, 0x7FFFFFFF))
            above = builder.icmp_signed(">", magnitude, largest)
            largest = builder.select(above, magnitude, largest)
        return _reduce(builder, "smax", largest)

    return types.int32(elements, types.int64), codegen


def _store_codes(element: Any, order: list[int], name: str) -> Any:
    @intrinsic
    def store(typingctx: Any, elements: Any, address: Any, inverse: Any, codes: Any, sums: Any) -> tuple[Any, _Codegen]:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, address, inverse, codes, sums = arguments
            factor = simd.splat(builder, inverse, _LANES)
            rounding = simd.constant(_F32S, ROUND)
            kind = ir.VectorType(element, _LANES)
            half = None
            for vector in range(COLUMN_BLOCK // _LANES):
                scaled = builder.fmul(_load(builder, elements.elements.format, address, vector), factor)
                whole = builder.fsub(builder.fadd(scaled, rounding), rounding)
                values = builder.fptosi(whole, _I32S)
                places = ir.Constant(_I32S, order)
                narrow = builder.trunc(builder.shuffle_vector(values, values, places), kind)
                at = builder.add(codes, ir.Constant(_I64, vector * _LANES * element.width // 8))
                builder.store(narrow, builder.inttoptr(at, kind.as_pointer()), align=1)
                if half is None:
                    half = values
                else:
                    at = builder.add(sums, ir.Constant(_I64, 4 * (vector // 2)))
                    total = _reduce(builder, "add", builder.add(half, values))
                    builder.store(total, builder.inttoptr(at, _I32.as_pointer()), align=4)
                    half = None
            return context.get_dummy_value()

        return types.void(elements, types.int64, types.float32, types.int64, types.int64), codegen

    store.__name__ = name
    return store


# Codes of 64 elements x at an address, round(x * inverse), and the sums of each 32, to two addresses.
store_bytes = _store_codes(_I8, list(range(_LANES)), "store_bytes")
# The same as int16; of each 4 codes the places are 0, 2, 1, 3.
store_words = _store_codes(_I16, [4 * four + i for four in range(4) for i in (0, 2, 1, 3)], "store_words")
