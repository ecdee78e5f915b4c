"""torch dtypes and the names of the formats that they compute in."""

from __future__ import annotations

import torch

from offload.errors import InvalidArgumentError, UnsupportedModelError

FORMAT_OF_DTYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPE_OF_FORMAT = {name: dtype for dtype, name in FORMAT_OF_DTYPE.items()}


def resolve_dtype(requested: str | torch.dtype, of_config: torch.dtype | None, of_weights: torch.dtype) -> torch.dtype:
    """The dtype that the model computes in.

    Args:
        requested: "auto", a torch dtype, or a name such as "bfloat16" or "bf16".
        of_config: what the checkpoint's config says, if anything.
        of_weights: what the experts are stored in.

    Raises:
        InvalidArgumentError: not a dtype that the kernels compute in.
    """
    if requested == "auto":
        dtype = of_config or of_weights
        if dtype not in FORMAT_OF_DTYPE:
            raise UnsupportedModelError(f"the checkpoint's dtype is {dtype}; this version computes in bf16, fp16, fp32")
        return dtype
    if isinstance(requested, str):
        found = DTYPE_OF_FORMAT.get(requested) or getattr(torch, requested, None)
    else:
        found = requested
    if found not in FORMAT_OF_DTYPE:
        raise InvalidArgumentError(f'dtype={requested!r}: expected "auto", "bfloat16", "float16" or "float32"')
    return found
