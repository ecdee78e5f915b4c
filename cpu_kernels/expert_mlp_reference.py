"""What `expert_mlp` must compute, in float64 and one pair at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from formats.bundle import BundleLayout

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def decode(raw: npt.NDArray[Any], format: str) -> torch.Tensor:
    """Stored elements, as bytes or as the array type that kernels take, in float64; the last axis holds elements."""
    flat = torch.from_numpy(np.ascontiguousarray(raw).view(np.uint8).copy())
    return flat.view(TORCH_DTYPES[format]).to(torch.float64)


def component(bundle: npt.NDArray[np.uint8], layout: BundleLayout, name: str) -> torch.Tensor:
    """One matrix or bias of a bundle in float64."""
    part = layout.components[name]
    return decode(bundle[part.offset : part.offset + part.nbytes], layout.format).reshape(part.shape)


def activate(activation: str, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """The activated product act(gate) * up, or act(up) where there is no gate."""
    if activation == "gpt_oss":
        assert gate is not None
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda value: F.gelu(value, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda value: F.relu(value).square(),
    }
    act = functions[activation]
    return act(up) if gate is None else act(gate) * up


def expert_up_reference(bundle: npt.NDArray[np.uint8], layout: BundleLayout, x: torch.Tensor) -> torch.Tensor:
    """Both gate | up of x [T, H] float64, as [T, 2 I], without a gate [T, I]."""
    names = ("gate", "up") if layout.has_gate else ("up",)
    sums = []
    for name in names:
        bias = component(bundle, layout, f"{name}_bias") if layout.has_bias else None
        sums.append(F.linear(x, component(bundle, layout, name), bias))
    return torch.cat(sums, -1)


def expert_down_reference(bundle: npt.NDArray[np.uint8], layout: BundleLayout, h: torch.Tensor) -> torch.Tensor:
    """The down projection of h [T, I] float64, as [T, H]."""
    bias = component(bundle, layout, "down_bias") if layout.has_bias else None
    return F.linear(h, component(bundle, layout, "down"), bias)


def expert_mlp_reference(
    bundle: npt.NDArray[np.uint8], layout: BundleLayout, x: torch.Tensor, activation: str
) -> torch.Tensor:
    """One expert of x [T, H] float64, as [T, H]; h is rounded to the layout's element type."""
    sums = expert_up_reference(bundle, layout, x)
    gate, up = sums.chunk(2, -1) if layout.has_gate else (None, sums)
    h = activate(activation, gate, up).to(torch.float32).to(TORCH_DTYPES[layout.format]).to(torch.float64)
    return expert_down_reference(bundle, layout, h)
