"""The weighted sum of a token's experts on the GPU."""

from __future__ import annotations

import torch

from gpu_kernels.combine_kernel import combine_kernel
from gpu_kernels.launch import Threads, launch

_COLUMNS = 512


def combine(
    rows: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, base: torch.Tensor | None = None
) -> torch.Tensor:
    """out[t] = base[t] + sum over i of weights[t, i] (sum over s of rows[s, t k + i]); fp32, rounded once.

    Parts are summed in ascending order, then experts in the order of their weights, so equal inputs give equal bits.
    A row of weight 0 is not read: give that weight to experts that are computed elsewhere.

    Args:
        rows: fp32 [S, T k, H], contiguous, as `expert_mlp` returns it.
        weights: fp32 [T, k], contiguous.
        out: [T, H], contiguous: bf16, fp16 or fp32.
        base: fp32 [T, H], contiguous; what other devices computed.

    Returns:
        out.

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    splits, pairs, hidden = rows.shape
    tokens, top_k = weights.shape
    if (
        rows.dtype != torch.float32
        or weights.dtype != torch.float32
        or pairs != tokens * top_k
        or out.shape != (tokens, hidden)
        or (base is not None and (base.shape != out.shape or base.dtype != torch.float32))
        or not all(tensor.is_contiguous() for tensor in (rows, weights, out, out if base is None else base))
    ):
        raise ValueError(
            "combine: expected contiguous fp32 rows [S, T k, H], fp32 weights [T, k], out [T, H] and fp32 base [T, H], "
            f"found {rows.dtype} {tuple(rows.shape)}, {weights.dtype} {tuple(weights.shape)}, {tuple(out.shape)}, "
            f"{None if base is None else (base.dtype, tuple(base.shape))}"
        )
    launch(
        combine_kernel,
        (tokens, -(-hidden // _COLUMNS)),
        (rows, weights, out if base is None else base, out, pairs, top_k, hidden),
        Threads(warps=4),
        rows.device,
        BASE=base is not None,
        SPLITS=splits,
        COLUMNS=_COLUMNS,
    )
    return out
