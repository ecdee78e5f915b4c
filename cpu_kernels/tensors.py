"""torch tensors as the kernels take them."""

from __future__ import annotations

from functools import cache

import torch

from cpu_kernels.isa import isa_of_format
from cpu_kernels.simd import Elements

FORMAT_OF_DTYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@cache
def elements_of(dtype: torch.dtype) -> Elements:
    """How elements of a dtype are computed on here.

    Raises:
        ValueError: no kernel takes them, or this CPU cannot convert them.
    """
    if dtype not in FORMAT_OF_DTYPE:
        raise ValueError(f"{dtype} has no kernel; known: {', '.join(map(str, FORMAT_OF_DTYPE))}")
    format = FORMAT_OF_DTYPE[dtype]
    return Elements(format, isa_of_format(format))


def describe(tensor: torch.Tensor) -> str:
    """A tensor in a message."""
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}{layout}"
