"""A linear layer with packed weights on the GPU."""

from __future__ import annotations

import torch

from formats.packed import MatrixLayout
from gpu_kernels.combine import combine
from gpu_kernels.configs import ProductConfig, product_configs, splits_of
from gpu_kernels.launch import dot_type, launch, processors
from gpu_kernels.linear_kernel import packed_linear_kernel

FEW_TOKENS = 16
"""Up to here one or two tiles hold all tokens, and the time is that of reading the weights."""


def packed_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    layout: MatrixLayout,
    bias: torch.Tensor | None = None,
    config: ProductConfig | None = None,
) -> torch.Tensor:
    """X W^T + bias, in x's dtype: [T, N]. Sums are fp32; nothing waits for the device.

    Args:
        x: [T, K], each row contiguous: bf16, fp16 or fp32.
        codes: uint8 [layout.codes_nbytes].
        scales: uint8 [layout.scales_nbytes].
        layout: of the matrix, N rows and K columns.
        bias: fp32 [N].
        config: tile sizes; None for the first candidate of this number of tokens.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    _check(x, codes, scales, layout, bias)
    tokens, rows, columns = len(x), layout.rows, layout.columns
    config = config or product_configs(layout.format, x.element_size(), few=tokens <= FEW_TOKENS)[0]
    grid = (-(-tokens // config.tokens), -(-rows // config.rows))
    splits = 1
    if tokens <= FEW_TOKENS:
        steps = -(-columns // config.columns)
        splits = splits_of(grid[0] * grid[1], config.threads.warps, steps, processors(x.device))
    dtype = x.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, tokens, rows, dtype=dtype, device=x.device)
    launch(
        packed_linear_kernel,
        (*grid, splits),
        (x, codes, scales, scales if bias is None else bias, out, tokens, rows, columns, x.stride(0)),
        config.threads,
        x.device,
        FORMAT=layout.format,
        DOT=dot_type(x.dtype),
        BIAS=bias is not None,
        SPLITS=splits,
        SCALE_WEIGHTS=config.scale_weights,
        TOKENS=config.tokens,
        ROWS=config.rows,
        COLUMNS=config.columns,
    )
    if splits == 1:
        return out[0]
    ones = torch.ones(tokens, 1, dtype=torch.float32, device=x.device)
    return combine(out, ones, torch.empty(tokens, rows, dtype=x.dtype, device=x.device))


def _check(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, layout: MatrixLayout, bias: torch.Tensor | None
) -> None:
    if x.dim() != 2 or x.shape[1] != layout.columns or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"x: expected [T, {layout.columns}], rows contiguous, found {tuple(x.shape)}")
    for name, tensor, nbytes in (("codes", codes, layout.codes_nbytes), ("scales", scales, layout.scales_nbytes)):
        if tensor.dtype != torch.uint8 or tensor.shape != (nbytes,) or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous uint8 [{nbytes}], found {tensor.dtype} {tuple(tensor.shape)}"
            )
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (layout.rows,) or not bias.is_contiguous()):
        raise ValueError(f"bias: expected contiguous fp32 [{layout.rows}], found {bias.dtype} {tuple(bias.shape)}")
    if any(tensor is not None and tensor.device != x.device for tensor in (codes, scales, bias)):
        raise ValueError(f"codes, scales and bias must be on {x.device}, where x is")
