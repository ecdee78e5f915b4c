# mypy: allow-untyped-calls
"""Logarithms and sigmoids in float32 of which loops make vectors: libm's are one number at a time.

Polynomials and reductions are those of logf and expf in Cephes (Moshier, netlib), good to about 2e-7.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic as numba_intrinsic

from prefetch.jit import inner_unordered

# What it stands for in kernels differs from what it is in Python.
intrinsic: Any = numba_intrinsic

_F = np.float32
# Numbers in a kernel's source are float64, and so would be everything they meet.
_ONE, _HALF, _ZERO, _ROOT_2 = _F(1), _F(0.5), _F(0), _F(1.41421356)
_LN2_HIGH, _LN2_LOW, _LOG2_E = _F(0.693359375), _F(-2.12194440e-4), _F(1.44269504)
_L0, _L1, _L2 = _F(7.0376836292e-2), _F(-1.1514610310e-1), _F(1.1676998740e-1)
_L3, _L4, _L5 = _F(-1.2420140846e-1), _F(1.4249322787e-1), _F(-1.6668057665e-1)
_L6, _L7, _L8 = _F(2.0000714765e-1), _F(-2.4999993993e-1), _F(3.3333331174e-1)
_E0, _E1, _E2 = _F(1.9875691500e-4), _F(1.3981999507e-3), _F(8.3334519073e-3)
_E3, _E4, _E5 = _F(4.1665795894e-2), _F(1.6666665459e-1), _F(5.0000001201e-1)

_FURTHEST = _F(80)


_I32, _F32 = ir.IntType(32), ir.FloatType()


@intrinsic
def _exponent(typingctx: Any, x: Any) -> Any:
    """E, float32, of x = m 2^e, 1 <= m < 2."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.lshr(builder.bitcast(arguments[0], _I32), _I32(23))
        return builder.sitofp(builder.sub(bits, _I32(127)), _F32)

    return types.float32(types.float32), codegen


@intrinsic
def _mantissa(typingctx: Any, x: Any) -> Any:
    """M, float32, of x = m 2^e, 1 <= m < 2."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        fraction = builder.and_(builder.bitcast(arguments[0], _I32), _I32(0x7FFFFF))
        return builder.bitcast(builder.or_(fraction, _I32(0x3F800000)), _F32)

    return types.float32(types.float32), codegen


@intrinsic
def _two_to(typingctx: Any, power: Any) -> Any:
    """2^power, float32, of a whole number, -126 to 127."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = builder.add(builder.fptosi(arguments[0], _I32), _I32(127))
        return builder.bitcast(builder.shl(whole, _I32(23)), _F32)

    return types.float32(types.float32), codegen


@inner_unordered
def log_of(x: Any) -> Any:
    """Ln x, float32, of a positive normal number."""
    mantissa = _mantissa(x)
    above = mantissa > _ROOT_2
    f = (mantissa * _HALF if above else mantissa) - _ONE
    e = _exponent(x) + (_ONE if above else _ZERO)
    series = ((((_L0 * f + _L1) * f + _L2) * f + _L3) * f + _L4) * f + _L5
    series = ((series * f + _L6) * f + _L7) * f + _L8
    z = f * f
    return f + (series * f * z + _LN2_LOW * e - _HALF * z) + _LN2_HIGH * e


@inner_unordered
def sigmoid_of(x: Any) -> Any:
    """1 / (1 + exp(-x)), float32."""
    t = min(max(-x, -_FURTHEST), _FURTHEST)
    power = np.floor(t * _LOG2_E + _HALF)
    t = t - power * _LN2_HIGH - power * _LN2_LOW
    series = ((((_E0 * t + _E1) * t + _E2) * t + _E3) * t + _E4) * t + _E5
    return _ONE / (_ONE + (series * t * t + t + _ONE) * _two_to(power))
