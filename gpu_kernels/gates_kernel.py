# mypy: allow-untyped-defs, allow-incomplete-defs
"""Activations of gated and plain experts, in fp32; the CPU's `cpu_kernels.activation_kernel` has the same names."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), of which no part overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, small, 1.0) / (1.0 + small)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of this name, but for gpt_oss, which has no form without a second factor.

    silu       x sigmoid(x)
    gelu       x (1 + erf(x / sqrt 2)) / 2
    gelu_tanh  x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
    relu       max(x, 0)
    relu2      max(x, 0)^2
    """
    if ACTIVATION == "silu":
        result = x * sigmoid(x)
    elif ACTIVATION == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        result = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        result = tl.maximum(x, 0.0)
    else:
        result = tl.maximum(x, 0.0)
        result = result * result
    return result


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """The product act(gate) up.

    gpt_oss: (u + 1) g sigmoid(1.702 g) with g = min(gate, 7) and u = clamp(up, -7, 7).
    """
    if ACTIVATION == "gpt_oss":
        g = tl.minimum(gate, 7.0)
        u = tl.minimum(tl.maximum(up, -7.0), 7.0)
        result = (u + 1.0) * g * sigmoid(1.702 * g)
    else:
        result = activate(gate, ACTIVATION) * up
    return result
