"""What `packed_linear` must compute, in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from formats.pack import unpack_matrix
from formats.packed import MatrixLayout


def packed_linear_reference(
    x: torch.Tensor,
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint8],
    layout: MatrixLayout,
    bias: torch.Tensor | None,
    *,
    rounded: bool,
) -> torch.Tensor:
    """float64 [T, N]; `rounded`: weights are rounded to x's dtype, as for many tokens; not those of fp8_e4m3."""
    weights = torch.from_numpy(unpack_matrix(codes, scales, layout))
    if rounded and layout.format != "fp8_e4m3":
        weights = weights.to(x.dtype)
    return torch.nn.functional.linear(x.double(), weights.double(), None if bias is None else bias.double())
