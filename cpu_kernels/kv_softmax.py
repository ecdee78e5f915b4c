# mypy: allow-untyped-defs, allow-untyped-calls
"""One row of scores turned into the exponentials of an online softmax, 16 lanes at a time.

Maxima and sums run over 16 lanes and then over these as a binary tree, so their order is fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from cpu_kernels.activation_kernel import exp_float32
from cpu_kernels.jit import carray, inner, intrinsic
from cpu_kernels.packing_simd import rows_load, rows_multiply, rows_splat, rows_type
from cpu_kernels.simd import float32_pointer

_Codegen = Callable[[Any, Any, Any, Any], Any]
_I32, _F32 = ir.IntType(32), ir.FloatType()
LANES = 16
_F32X16, _I32X16 = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_MINUS_INFINITY = np.float32(-np.inf)
# As in `activation_kernel.exp_float32`.
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def _splat(value: float) -> Any:
    return ir.Constant(_F32X16, [float(np.float32(value))] * LANES)


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    function_type = ir.FunctionType(_F32X16, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def rows_max(typingctx: Any, a: Any, b: Any) -> tuple[Any, _Codegen]:
    """The larger of each lane; b where one is a NaN."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _larger(builder, *arguments)

    return rows_type(rows_type, rows_type), codegen


@intrinsic
def rows_add(typingctx: Any, a: Any, b: Any) -> tuple[Any, _Codegen]:
    """The sum of each lane."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return rows_type(rows_type, rows_type), codegen


@intrinsic
def rows_exp_below(typingctx: Any, a: Any, largest: Any) -> tuple[Any, _Codegen]:
    """exp(a - largest) for a <= largest, to about one unit in the last place; at least exp(-87.3); a NaN stays one."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        difference = builder.fsub(*arguments)
        x = _larger(builder, difference, _splat(-87.3))
        power = _call(builder, "llvm.floor.v16f32", _call(builder, "llvm.fma.v16f32", x, _splat(_LOG2_E), _splat(0.5)))
        rest = _call(builder, "llvm.fma.v16f32", power, _splat(-_LN2_HIGH), x)
        rest = _call(builder, "llvm.fma.v16f32", power, _splat(-_LN2_LOW), rest)
        value = _splat(_POLYNOMIAL[0])
        for factor in _POLYNOMIAL[1:]:
            value = _call(builder, "llvm.fma.v16f32", value, rest, _splat(factor))
        square = builder.fmul(rest, rest)
        value = _call(builder, "llvm.fma.v16f32", value, square, builder.fadd(rest, _splat(1)))
        exponent = builder.add(builder.fptosi(power, _I32X16), ir.Constant(_I32X16, [127] * LANES))
        scale = builder.bitcast(builder.shl(exponent, ir.Constant(_I32X16, [23] * LANES)), _F32X16)
        return builder.fadd(builder.fmul(value, scale), builder.fsub(difference, difference))

    return rows_type(rows_type, rows_type), codegen


@intrinsic
def rows_store(typingctx: Any, address: Any, rows: Any) -> tuple[Any, _Codegen]:
    """Write 16 fp32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, rows = arguments
        builder.store(rows, builder.inttoptr(address, _F32X16.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, rows_type), codegen


def _reduction(name: str, combine: Callable[[Any, Any, Any], Any], doc: str) -> Any:
    def operation(typingctx: Any, rows: Any) -> tuple[Any, _Codegen]:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            (vector,) = arguments
            lanes = LANES
            while lanes > 1:
                lanes //= 2
                index = ir.VectorType(_I32, lanes)
                undefined = ir.Constant(vector.type, ir.Undefined)
                low, high = (
                    builder.shuffle_vector(vector, undefined, ir.Constant(index, list(range(start, start + lanes))))
                    for start in (0, lanes)
                )
                vector = combine(builder, low, high)
            return builder.extract_element(vector, ir.Constant(_I32, 0))

        return types.float32(rows_type), codegen

    operation.__name__ = operation.__qualname__ = name
    operation.__doc__ = doc
    return intrinsic(operation)


rows_sum = _reduction("rows_sum", lambda builder, a, b: builder.fadd(a, b), "The sum of 16 lanes, halves added.")
rows_maximum = _reduction("rows_maximum", _larger, "The largest of 16 lanes that are no NaN.")


@inner
def load_four(address):
    """Four vectors of 16 fp32 that follow each other."""
    return rows_load(address), rows_load(address + 64), rows_load(address + 128), rows_load(address + 192)


@inner
def multiply_four(rows, others):
    """Products of four vectors with four others."""
    a, b, c, d = rows
    e, f, g, h = others
    return rows_multiply(a, e), rows_multiply(b, f), rows_multiply(c, g), rows_multiply(d, h)


@inner
def multiply_row(row, factors, factor, count):
    """Row[i] *= factors[i] factor: fp32 at two addresses, count a multiple of 16."""
    both = rows_splat(factor)
    for i in range(0, 4 * count, 64):
        rows_store(row + i, rows_multiply(rows_load(row + i), rows_multiply(rows_load(factors + i), both)))


@inner
def scale_row(row, factor, count):
    """Row[i] *= factor: fp32 at an address, count a multiple of 16."""
    factors = rows_splat(factor)
    for i in range(0, 4 * count, 64):
        rows_store(row + i, rows_multiply(rows_load(row + i), factors))


@inner
def largest_so_far(part, width, largest):
    """The larger of a block's largest score and of a row's before; of a NaN, the row's."""
    before = carray(float32_pointer(part), (width,))[width - 2]
    return largest if largest > before else before


@inner
def add_exponentials(part, width, largest, total):
    """Add a block's exponentials to what a row has so far, which is brought to the larger of both largest scores.

    part: address of fp32 [width]: sums of values, ..., the largest score, the sum of exponentials. largest: at least
    that score. total: of exponentials below `largest`.
    """
    state = carray(float32_pointer(part), (width,))
    before = state[width - 2]
    if largest != before:
        share = exp_float32(before - largest) if before > _MINUS_INFINITY else np.float32(0)
        scale_row(part, share, width - 16)
        state[width - 1] *= share
        state[width - 2] = largest
    state[width - 1] += total


@inner
def cap_row(row, cap, count):
    """Row[i] = cap tanh(row[i] / cap), within 2e-7 cap."""
    values = carray(float32_pointer(row), (count,))
    one, two = np.float32(1), np.float32(2)
    for i in range(count):
        x = values[i]
        values[i] = cap * (one - two / (exp_float32(two * (x / cap)) + one)) + (x - x)


@inner
def hide(row, low, high, count, value):
    """Row[i] = value outside [low, high)."""
    values = carray(float32_pointer(row), (count,))
    for i in range(low):
        values[i] = value
    for i in range(high, count):
        values[i] = value


@inner
def hide_invalid(row, low, high, valid, value):
    """Row[i] = value where valid[i], a byte each, is zero."""
    values = carray(float32_pointer(row), (high,))
    for i in range(low, high):
        if valid[i] == 0:
            values[i] = value


@inner
def largest_of_row(row, count):
    """The largest number of a row; count a multiple of 16."""
    largest = rows_load(row)
    for i in range(64, 4 * count, 64):
        largest = rows_max(largest, rows_load(row + i))
    return rows_maximum(largest)


@inner
def scale_row_largest(row, factor, count):
    """`scale_row`; returns the `largest_of_row` of what it leaves."""
    factors = rows_splat(factor)
    largest = rows_multiply(rows_load(row), factors)
    rows_store(row, largest)
    for i in range(64, 4 * count, 64):
        scaled = rows_multiply(rows_load(row + i), factors)
        rows_store(row + i, scaled)
        largest = rows_max(largest, scaled)
    return rows_maximum(largest)


@inner
def exponentials_and_sum(row, largest, count):
    """Row[i] = exp(row[i] - largest); returns the `sum_of_row` of these. count a multiple of 16."""
    above = rows_splat(largest)
    total = rows_exp_below(rows_load(row), above)
    rows_store(row, total)
    for i in range(64, 4 * count, 64):
        numbers = rows_exp_below(rows_load(row + i), above)
        rows_store(row + i, numbers)
        total = rows_add(total, numbers)
    return rows_sum(total)


@inner
def sum_of_row(row, count):
    """The sum of a row; count a multiple of 16."""
    total = rows_load(row)
    for i in range(64, 4 * count, 64):
        total = rows_add(total, rows_load(row + i))
    return rows_sum(total)
