"""Weights out of torch tensors into packed memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.packing import pack_into
from cpu_kernels.threads import Pool
from formats.packed import MatrixLayout
from offload.checkpoint.encoded import EncodedMatrix
from offload.errors import CheckpointError
from offload.packed_copy import can_copy, copy_codes

PACKING_VERSION = 1
"""Part of a packed store's identity; rises whenever the same weights would be packed into other bytes."""

_TAKEN = (torch.float32, torch.float16, torch.bfloat16)


def pack_tensor(
    weights: torch.Tensor | EncodedMatrix,
    layout: MatrixLayout,
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint8],
    what: str,
    pool: Pool | None = None,
) -> None:
    """Quantise a matrix in the dtype in which it is stored.

    What is quantised already in codes of the packed format keeps the values of its weights: fp8_e4m3 with blocks of
    128 x 128 is copied, and packing MXFP4 as mxfp4 finds scales that leave no error. Other codes are decoded to fp32.

    Args:
        weights: [N, K] on the CPU, of any floating dtype, or encoded.
        layout: of the packed matrix.
        codes: where its codes go.
        scales: where its scales go.
        what: names the weights in errors.
        pool: threads; None for the calling one.

    Raises:
        CheckpointError: a weight is NaN, infinite or too large.
    """
    try:
        if isinstance(weights, EncodedMatrix):
            if can_copy(weights, layout):
                copy_codes(weights, layout, codes, scales)
                return
            weights = weights.decode(torch.bfloat16 if weights.encoding == "mxfp4" else torch.float32)
        if weights.dtype not in _TAKEN:
            weights = weights.float()
        if weights.shape[1] > 1 and weights.stride(1) != 1:
            weights = weights.contiguous()
        pack_into(_as_numpy(weights), layout, codes, scales, pool)
    except ValueError as error:
        raise CheckpointError(
            f"{what}: {error}. Fix: load it without quant=, or get a checkpoint without such weights."
        ) from error


def _as_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The tensor's memory; bf16, which numpy lacks, as its bits."""
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()
