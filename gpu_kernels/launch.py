"""How wrappers start kernels: one place that knows Triton's launch options and whether its interpreter is on."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
DTYPE_OF_FORMAT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Threads:
    """How one program is run.

    Attributes:
        warps: of 32 threads.
        stages: iterations of a loop whose loads are under way at once.
    """

    warps: int
    stages: int = 1


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on tensors of the CPU."""
    return bool(triton.knobs.runtime.interpret)


def dot_type(dtype: torch.dtype) -> Any:
    """The type of a matrix product's operands for activations of this dtype.

    The interpreter multiplies bf16 wrongly. There operands are widened to fp32, which changes no product: those of
    two 16-bit values are exact in fp32.

    Raises:
        ValueError: a dtype that kernels do not take.
    """
    element = element_type(dtype)
    return tl.float32 if interpreting() else element


def element_type(dtype: torch.dtype) -> Any:
    """What values of this dtype are rounded to, in Triton's terms.

    Raises:
        ValueError: a dtype that kernels do not take.
    """
    if dtype not in DOT_TYPES:
        raise ValueError(f"kernels take bf16, fp16 and fp32, not {dtype}")
    return DOT_TYPES[dtype]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    threads: Threads,
    device: torch.device,
    **constants: Any,
) -> None:
    """Start a kernel on the current stream of a device; returns at once.

    Args:
        kernel: a function under `triton.jit`.
        grid: programs along up to three axes; with none of them nothing is started.
        arguments: tensors and integers, by position.
        threads: of one program.
        device: where the tensors are; the kernel runs there, whatever the current device is.
        constants: compile-time values by name.
    """
    if 0 in grid:
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # Fusing a product and a sum rounds once instead of twice; said here because Triton's default is to change.
        kernel[grid](*arguments, **constants, num_warps=threads.warps, num_stages=threads.stages, enable_fp_fusion=True)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; what the interpreter stands for has as many as a mid-range card."""
    if device.type != "cuda":
        return 40
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
