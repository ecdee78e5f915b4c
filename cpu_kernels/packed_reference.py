"""What packed kernels must compute: activation quantisation bit by bit, products in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.expert_mlp_reference import activate
from formats.bundle import BundleLayout
from formats.pack import unpack_matrix
from formats.packed import COLUMN_BLOCK, MatrixLayout


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int8 [T, K_p], scales fp32 [T, K_p / 64] and sums of codes int32 [T, K_p / 32] of x [T, K].

    Columns are filled up with zeros to K_p, a multiple of 64. Where a group of 64 has a value that is not finite, its
    scale is NaN and its codes are 0.
    """
    tokens, columns = x.shape
    blocks = -(-columns // COLUMN_BLOCK)
    padded = torch.nn.functional.pad(x.float(), (0, -columns % COLUMN_BLOCK)).view(tokens, blocks, COLUMN_BLOCK)
    finite = padded.isfinite().all(-1, keepdim=True)
    padded = torch.where(finite, padded, 0.0)
    scales = padded.abs().amax(-1, keepdim=True) / 127
    scales = torch.where(scales >= 2.0**-126, scales, 0.0)
    inverses = torch.where(scales > 0, 1 / scales, 0.0)
    codes = (padded * inverses).round()
    sums = codes.view(tokens, 2 * blocks, 32).sum(-1).int()
    scales = torch.where(finite, scales, torch.nan)
    return codes.to(torch.int8).view(tokens, blocks * COLUMN_BLOCK), scales.squeeze(-1), sums


def quantised(x: torch.Tensor, format: str) -> torch.Tensor:
    """Activations as a kernel of this format sees them, [T, K] in float64."""
    if format == "fp8_e4m3":
        return x.double()
    codes, scales, _ = quantise(x)
    values = codes.double().view(*scales.shape, COLUMN_BLOCK) * scales.double().unsqueeze(-1)
    return values.flatten(1)[:, : x.shape[1]]


def packed_linear_reference(
    x: torch.Tensor,
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint8],
    layout: MatrixLayout,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """q(x) W^T + bias of x [T, K], in float64, not rounded."""
    weights = torch.from_numpy(unpack_matrix(codes, scales, layout)).double()
    result = quantised(x, layout.format) @ weights.T
    return result if bias is None else result + bias.double()


def _project(name: str, bundle: npt.NDArray[np.uint8], layout: BundleLayout, x: torch.Tensor) -> torch.Tensor:
    def part(suffix: str) -> Any:
        component = layout.components[name + suffix]
        return bundle[component.offset : component.offset + component.nbytes]

    bias = torch.from_numpy(part("_bias").view(np.float32).copy()) if layout.has_bias else None
    return packed_linear_reference(x, part(""), part("_scale"), layout.matrix(name), bias)


def packed_expert_up_reference(bundle: npt.NDArray[np.uint8], layout: BundleLayout, x: torch.Tensor) -> torch.Tensor:
    """Both gate | up of x [T, H], as [T, 2 I] float64, without a gate [T, I]."""
    names = ("gate", "up") if layout.has_gate else ("up",)
    return torch.cat([_project(name, bundle, layout, x) for name in names], -1)


def packed_expert_down_reference(bundle: npt.NDArray[np.uint8], layout: BundleLayout, h: torch.Tensor) -> torch.Tensor:
    """The down projection of h [T, I], as [T, H] float64."""
    return _project("down", bundle, layout, h)


def packed_expert_mlp_reference(
    bundle: npt.NDArray[np.uint8], layout: BundleLayout, x: torch.Tensor, activation: str
) -> torch.Tensor:
    """One expert of x [T, H], as [T, H] float64."""
    sums = packed_expert_up_reference(bundle, layout, x)
    gate, up = sums.chunk(2, -1) if layout.has_gate else (None, sums)
    return packed_expert_down_reference(bundle, layout, activate(activation, gate, up).float())
