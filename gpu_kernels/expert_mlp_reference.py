"""What `expert_mlp` must compute, in float64, one pair at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from formats.bundle import BundleLayout
from formats.pack import unpack_matrix
from gpu_kernels.launch import DTYPE_OF_FORMAT

Bytes = npt.NDArray[np.uint8]


def matrix_reference(bundle: Bytes, layout: BundleLayout, name: str) -> torch.Tensor:
    """The weights of one matrix, float64 [rows, columns]."""
    if layout.is_packed:
        codes, scales = _bytes(bundle, layout, name), _bytes(bundle, layout, f"{name}_scale")
        return torch.from_numpy(unpack_matrix(codes, scales, layout.matrix(name))).double()
    return _elements(bundle, layout, name, layout.format).view(layout.shape(name))


def bias_reference(bundle: Bytes, layout: BundleLayout, name: str) -> torch.Tensor | None:
    """The bias of one matrix in float64."""
    return _elements(bundle, layout, f"{name}_bias", layout.bias_element.name) if layout.has_bias else None


def _bytes(bundle: Bytes, layout: BundleLayout, name: str) -> Bytes:
    part = layout.components[name]
    return bundle[part.offset : part.offset + part.nbytes].copy()


def _elements(bundle: Bytes, layout: BundleLayout, name: str, format: str) -> torch.Tensor:
    return torch.from_numpy(_bytes(bundle, layout, name)).view(DTYPE_OF_FORMAT[format]).double()


def activate_reference(activation: str, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """The product act(gate) up, or act(up) where there is no gate."""
    if activation == "gpt_oss":
        assert gate is not None
        gate = gate.clamp(max=7.0)
        return (up.clamp(-7.0, 7.0) + 1) * gate * torch.sigmoid(1.702 * gate)
    value = up if gate is None else gate
    if activation == "silu":
        value = F.silu(value)
    elif activation in ("gelu", "gelu_tanh"):
        value = F.gelu(value, approximate="tanh" if activation == "gelu_tanh" else "none")
    else:
        value = F.relu(value) if activation == "relu" else F.relu(value).square()
    return value if gate is None else value * up


def expert_up_reference(bundle: Bytes, layout: BundleLayout, x: torch.Tensor, *, rounded: bool) -> torch.Tensor:
    """Gate | up of x [n, H], float64.

    Args:
        bundle: the expert.
        layout: of the bundle.
        x: in the dtype of computing.
        rounded: weights of packed formats are rounded to x's dtype, as kernels for many tokens do.
    """
    names = ("gate", "up") if layout.has_gate else ("up",)
    return torch.cat([_linear(bundle, layout, name, x, rounded=rounded) for name in names], -1)


def expert_mlp_reference(
    bundle: Bytes, layout: BundleLayout, x: torch.Tensor, activation: str, *, rounded: bool
) -> torch.Tensor:
    """One expert of x [n, H]: float64 [n, H]; the activated product is rounded to x's dtype."""
    sums = expert_up_reference(bundle, layout, x, rounded=rounded)
    gate, up = sums.chunk(2, -1) if layout.has_gate else (None, sums)
    h = activate_reference(activation, gate, up).to(x.dtype)
    return _linear(bundle, layout, "down", h, rounded=rounded)


def _linear(bundle: Bytes, layout: BundleLayout, name: str, x: torch.Tensor, *, rounded: bool) -> torch.Tensor:
    weights = matrix_reference(bundle, layout, name)
    # fp8_e4m3 has scales of whole blocks, which are applied to sums whatever the number of tokens.
    if rounded and layout.format != "fp8_e4m3":
        weights = weights.to(x.dtype).double()
    return F.linear(x.double(), weights, bias_reference(bundle, layout, name))
