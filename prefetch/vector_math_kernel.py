# mypy: allow-untyped-calls
"""Logarithms and sigmoids of whole arrays in float32, in vectors: libm's are one number at a time.

Polynomials and reductions are those of logf and expf in Cephes (Moshier, netlib), good to about 2e-7.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import inner_unordered

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


@inner_unordered
def log_into(x: Any, out: Any) -> None:
    """Out = ln x.

    Args:
        x: float32 [n], contiguous, positive and normal.
        out: float32 [n]; not x.
    """
    bits = x.view(np.int32)
    exponents, fractions = np.empty(len(x), np.int32), np.empty(len(x), np.int32)
    for place in range(len(x)):
        exponents[place] = (bits[place] >> 23) - 127
        fractions[place] = (bits[place] & 0x7FFFFF) | 0x3F800000
    mantissas = fractions.view(np.float32)
    for place in range(len(x)):
        above = mantissas[place] > _ROOT_2
        f = (mantissas[place] * _HALF if above else mantissas[place]) - _ONE
        e = _F(exponents[place]) + (_ONE if above else _ZERO)
        series = ((((_L0 * f + _L1) * f + _L2) * f + _L3) * f + _L4) * f + _L5
        series = ((series * f + _L6) * f + _L7) * f + _L8
        z = f * f
        out[place] = f + (series * f * z + _LN2_LOW * e - _HALF * z) + _LN2_HIGH * e


@inner_unordered
def sigmoid_into(x: Any, out: Any) -> None:
    """Out = 1 / (1 + exp(-x)).

    Args:
        x: float32 [n].
        out: float32 [n]; may be x.
    """
    powers = np.empty(len(x), np.int32)
    scales = powers.view(np.float32)
    for place in range(len(x)):
        power = np.floor(min(max(-x[place], -_FURTHEST), _FURTHEST) * _LOG2_E + _HALF)
        powers[place] = (np.int32(power) + 127) << 23
    for place in range(len(x)):
        t = min(max(-x[place], -_FURTHEST), _FURTHEST)
        power = np.floor(t * _LOG2_E + _HALF)
        t = t - power * _LN2_HIGH - power * _LN2_LOW
        series = ((((_E0 * t + _E1) * t + _E2) * t + _E3) * t + _E4) * t + _E5
        out[place] = _ONE / (_ONE + (series * t * t + t + _ONE) * scales[place])
