# mypy: allow-untyped-defs
"""Activations of gated and plain experts in fp32, written so that LLVM turns their loops into vector code."""

from __future__ import annotations

import math

import numpy as np

from cpu_kernels.jit import carray, inner
from cpu_kernels.simd import element_pointer, float32_from_bits, float32_pointer, float32_to_element

# The numbers stand in job descriptions; the names are those of transformers' ACT2FN where it has one.
ACTIVATION_CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "gpt_oss": 5}
ACTIVATION_ALIASES = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

GPT_OSS_LIMIT = 7.0
GPT_OSS_ALPHA = 1.702

_SILU, _GELU, _GELU_TANH, _RELU, _RELU2, _GPT_OSS = ACTIVATION_CODES.values()

_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts: the product of the first with any exponent of a float32 is exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_EXP_LOW, _EXP_HIGH = np.float32(-87.3), np.float32(88.3)
# Minimax of (exp(r) - 1 - r) / r**2 on [-ln 2 / 2, ln 2 / 2] (Cephes expf).
_C0, _C1, _C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_GELU_SCALE = np.float32(2 * math.sqrt(2 / math.pi))
_GELU_CUBIC = np.float32(0.044715)
_SQRT_HALF = np.float32(math.sqrt(0.5))
_LIMIT, _ALPHA = np.float32(GPT_OSS_LIMIT), np.float32(GPT_OSS_ALPHA)


@inner
def exp_float32(x):
    """exp(x) for fp32, to about one unit in the last place; x is first clamped to [-87.3, 88.3], a NaN to -87.3."""
    x = x if x > _EXP_LOW else _EXP_LOW
    x = x if x < _EXP_HIGH else _EXP_HIGH
    power = np.floor(x * _LOG2_E + _HALF)
    r = (x - power * _LN2_HIGH) - power * _LN2_LOW
    p = _C0
    p = p * r + _C1
    p = p * r + _C2
    p = p * r + _C3
    p = p * r + _C4
    p = p * r + _C5
    scale = float32_from_bits(np.int32((np.int32(power) + np.int32(127)) << np.int32(23)))
    return (p * (r * r) + r + _ONE) * scale


@inner
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return _ONE / (_ONE + exp_float32(-x))


@inner
def activate(code, x):
    """The activation with this code, but for gpt_oss, which has no form without a second factor.

    silu       x sigmoid(x)
    gelu       x erfc(-x / sqrt 2) / 2
    gelu_tanh  x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
    relu       max(x, 0)
    relu2      max(x, 0)^2
    """
    if code == _SILU:
        return x * sigmoid(x)
    if code == _GELU:
        return _HALF * x * np.float32(math.erfc(-x * _SQRT_HALF))
    if code == _GELU_TANH:
        return x * sigmoid(_GELU_SCALE * (x + _GELU_CUBIC * x * x * x))
    positive = x if not x < _ZERO else _ZERO
    return positive if code == _RELU else positive * positive


@inner
def gated_row(elements, code, gate_address, up_address, h_address, count):
    """h[i] = act(gate[i]) up[i] for i < count, rounded to elements; gate and up are fp32.

    gpt_oss: g = min(gate, 7), u = clamp(up, -7, 7), h = (u + 1) g sigmoid(1.702 g).
    """
    gate = carray(float32_pointer(gate_address), (count,))
    up = carray(float32_pointer(up_address), (count,))
    h = carray(element_pointer(elements, h_address), (count,))
    if code == _SILU:
        for i in range(count):
            h[i] = float32_to_element(elements, activate(_SILU, gate[i]) * up[i])
    elif code == _GPT_OSS:
        for i in range(count):
            g = gate[i] if not gate[i] > _LIMIT else _LIMIT
            u = up[i] if not up[i] > _LIMIT else _LIMIT
            u = u if not u < -_LIMIT else -_LIMIT
            h[i] = float32_to_element(elements, (u + _ONE) * (g * sigmoid(_ALPHA * g)))
    else:
        for i in range(count):
            h[i] = float32_to_element(elements, activate(code, gate[i]) * up[i])


@inner
def plain_row(elements, code, up_address, h_address, count):
    """h[i] = act(up[i]) for i < count, rounded to elements; up is fp32."""
    up = carray(float32_pointer(up_address), (count,))
    h = carray(element_pointer(elements, h_address), (count,))
    for i in range(count):
        h[i] = float32_to_element(elements, activate(code, up[i]))
