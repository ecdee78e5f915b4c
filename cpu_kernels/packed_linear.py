"""A linear layer with packed weights, for any number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import packed_jobs as jobs
from cpu_kernels.activation_quantisation_kernel import ELEMENT_NUMBERS, KINDS, quantise_task
from cpu_kernels.compiling.compiler import direct
from cpu_kernels.isa import converts_fp16, isa_of_format
from cpu_kernels.packed_kernel import OUTPUT_NUMBERS, packed_task
from cpu_kernels.packed_simd import BLOCK_NBYTES, PackedCode
from cpu_kernels.tensors import FORMAT_OF_DTYPE, describe
from cpu_kernels.threads import Pool, shared_pool
from cpu_kernels.workspace import workspace
from formats.packed import MatrixLayout


@dataclass(frozen=True)
class PackedWeights:
    """One packed matrix in memory.

    Attributes:
        codes: uint8 [layout.codes_nbytes], contiguous, or the address of as many bytes that stay valid.
        scales: uint8 [layout.scales_nbytes], likewise.
        layout: shape and format.
    """

    codes: torch.Tensor | int
    scales: torch.Tensor | int
    layout: MatrixLayout

    @cached_property
    def addresses(self) -> tuple[int, int]:
        """Of codes and of scales.

        Raises:
            ValueError: a tensor that does not fit the layout.
        """
        return (
            _address("codes", self.codes, self.layout.codes_nbytes),
            _address("scales", self.scales, self.layout.scales_nbytes),
        )


def _address(name: str, part: torch.Tensor | int, nbytes: int) -> int:
    if isinstance(part, int):
        return part
    if part.dtype != torch.uint8 or part.numel() != nbytes or not part.is_contiguous() or not part.is_cpu:
        raise ValueError(f"{name}: expected contiguous torch.uint8 ({nbytes},) on the CPU, found {describe(part)}")
    return part.data_ptr()


@cache
def code_of_format(format: str) -> PackedCode:
    """The code that a packed format is computed with here."""
    return PackedCode(format, isa_of_format(format))


@cache
def tasks_of_format(format: str) -> npt.NDArray[np.int64]:
    """Addresses of the tasks of quantisation and of a packed format; compiled or loaded on first use."""
    return np.array([quantise_task(converts_fp16()), packed_task(code_of_format(format), converts_fp16())], np.int64)


def packed_linear(
    x: torch.Tensor,
    weights: PackedWeights,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    pool: Pool | None = None,
) -> None:
    """Compute out = round(q(x) W^T + bias).

    q rounds to int8 in groups of 64 columns (`activation_quantisation_kernel`), for fp8_e4m3 not at all. Sums are fp32.

    The bits of a token's row depend neither on the number of threads, nor on the ISA, nor on the other tokens. Where
    x is not finite in a group of 64 columns, the token's row is NaN.

    Args:
        x: [T, K] on the CPU, each row contiguous; fp32, bf16 or fp16.
        weights: of N rows and K columns.
        out: [T, N] on the CPU, each row contiguous; fp32, bf16 or fp16; overlaps nothing else.
        bias: fp32 [N], contiguous, or None.
        pool: the threads; None for the process's default.

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
    """
    layout = weights.layout
    tokens = x.shape[0]
    element, output = FORMAT_OF_DTYPE.get(x.dtype), FORMAT_OF_DTYPE.get(out.dtype)
    if (
        element is None
        or output is None
        or x.shape != (tokens, layout.columns)
        or out.shape != (tokens, layout.rows)
        or not (x.is_cpu and out.is_cpu)
        or not (_rows_are_contiguous(x) and _rows_are_contiguous(out))
        or (bias is not None and not _is_bias(bias, layout.rows))
    ):
        raise ValueError(
            f"packed_linear: expected x [T, {layout.columns}], out [T, {layout.rows}] of fp32, bf16 or fp16 and bias "
            f"torch.float32 ({layout.rows},), rows contiguous, on the CPU; found {describe(x)}, {describe(out)}, "
            f"{'none' if bias is None else describe(bias)}"
        )
    if "fp16" in (element, output) and not converts_fp16():
        raise ValueError("packed_linear: this CPU, or the features Numba may use, lacks f16c; convert to bf16 or fp32")
    pool = shared_pool() if pool is None else pool
    code = code_of_format(layout.format)
    codes, scales = weights.addresses
    activations_nbytes = tokens * (layout.padded_columns // 64) * BLOCK_NBYTES[code.activation]
    scratch = workspace(8 * jobs.linear_words(tokens, layout.rows, activations_nbytes, output != "fp32"))
    launcher, state = pool.launcher
    direct(jobs.run_linear)(
        launcher, state, pool.threads, tasks_of_format(layout.format), KINDS[code.activation], code.codes_nbytes,
        ELEMENT_NUMBERS[element], OUTPUT_NUMBERS[output], x.data_ptr(), x.stride(0) * x.element_size(), tokens,
        codes, scales, 0 if bias is None else bias.data_ptr(), layout.rows, layout.columns,
        out.data_ptr(), out.stride(0) * out.element_size(), scratch,
    )  # fmt: skip


def _rows_are_contiguous(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and (tensor.stride(1) == 1 or tensor.shape[1] <= 1)


def _is_bias(bias: torch.Tensor, rows: int) -> bool:
    return bias.dtype == torch.float32 and bias.shape == (rows,) and bias.is_contiguous() and bias.is_cpu
