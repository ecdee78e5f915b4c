"""Root mean square normalisation of rows, in one pass over memory, with the rounding steps that models have."""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import torch

from cpu_kernels.rms_norm_kernel import rms_norm_task, run_rms_norm
from cpu_kernels.tensors import describe, elements_of
from cpu_kernels.threads import Pool

Form = Literal["plain", "rounded", "plus_one"]
FORMS: tuple[Form, ...] = get_args(Form)


@cache
def _task(dtype: torch.dtype) -> int:
    return rms_norm_task(elements_of(dtype))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, form: Form, pool: Pool) -> torch.Tensor:
    """Normalise rows: with r = 1 / sqrt(mean(x^2) + epsilon) in fp32,

        plain      y = round(w * (x r))                        gpt-oss
        rounded    y = round(w * round(x r))                   Llama, Qwen, Mixtral, DeepSeek
        plus_one   y = round((x r) * (1 + w))                  Gemma, Qwen3-Next

    The bits of a row depend neither on the number of threads nor on the other rows.

    Args:
        x: [..., K] on the CPU, contiguous; bf16, fp16 or fp32.
        weight: [K], contiguous, of the same dtype.
        epsilon: what keeps a row of zeros finite.
        form: where the weight comes in.
        pool: the threads; few rows run on the calling one.

    Returns:
        As x, contiguous.

    Raises:
        ValueError: a shape, dtype, device, layout or form that does not fit.
    """
    (columns,) = weight.shape
    dtype = x.dtype
    if (
        x.shape[-1] != columns
        or weight.dtype is not dtype
        or not (x.is_cpu and weight.is_cpu and x.is_contiguous() and weight.is_contiguous())
        or form not in FORMS
    ):
        raise ValueError(
            f"rms_norm: expected contiguous x [..., K] and weight [K] of one dtype on the CPU and a form of "
            f"{', '.join(FORMS)}, found {describe(x)}, {describe(weight)} and {form!r}"
        )
    out = torch.empty_like(x)
    launcher, state = pool.launcher
    run_rms_norm(
        launcher, state, _task(dtype), FORMS.index(form), dtype.itemsize, x.data_ptr(), weight.data_ptr(),
        x.numel() // columns, columns, out.data_ptr(), epsilon,
    )  # fmt: skip
    return out
