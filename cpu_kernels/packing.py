"""Packing of weights at speed: `formats.pack.pack_matrix`, compiled, bit for bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels import packing_kernel as kernel
from cpu_kernels.isa import isa_of_format
from cpu_kernels.simd import Elements
from cpu_kernels.threads import Pool
from formats.packed import BLOCK_ROWS, TILE_ROWS, MatrixLayout

SOURCE_FORMATS = {np.dtype(np.uint16): "bf16", np.dtype(np.float16): "fp16", np.dtype(np.float32): "fp32"}


def pack_into(
    weights: npt.NDArray[Any],
    layout: MatrixLayout,
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint8],
    pool: Pool | None = None,
) -> None:
    """Quantise one matrix into memory that is there; the bits are those of `formats.pack.pack_matrix`.

    Args:
        weights: [N, K], each row contiguous; float32, float16, or bf16 as its bits in uint16.
        layout: N, K and the packed format.
        codes: uint8 [layout.codes_nbytes], contiguous and writable; every byte is written.
        scales: uint8 [layout.scales_nbytes], likewise.
        pool: threads that share the work; None for the calling thread alone, without locks, so that several threads
            may pack at the same time.

    Raises:
        ValueError: a shape or type that does not fit, or a weight that is not finite or not below LARGEST_MAGNITUDE;
            `codes` and `scales` are then partly written.
    """
    if weights.dtype not in SOURCE_FORMATS or weights.shape != (layout.rows, layout.columns):
        raise ValueError(
            f"weights: expected float32, float16 or uint16 [{layout.rows}, {layout.columns}], found "
            f"{weights.dtype.name} {weights.shape}"
        )
    if layout.columns > 1 and weights.strides[1] != weights.itemsize:
        raise ValueError(f"weights: the elements of a row must be contiguous, found strides {weights.strides}")
    for name, array, nbytes in (("codes", codes, layout.codes_nbytes), ("scales", scales, layout.scales_nbytes)):
        if array.dtype != np.uint8 or array.shape != (nbytes,) or not array.flags.c_contiguous:
            raise ValueError(f"{name}: expected contiguous uint8 [{nbytes}], found {array.dtype.name} {array.shape}")
        if not array.flags.writeable:
            raise ValueError(f"{name}: the array is read-only")
    job = np.zeros(kernel.JOB_FIELDS, np.int64)
    job[kernel.SOURCE], job[kernel.ROW_BYTES] = weights.ctypes.data, weights.strides[0]
    job[kernel.ROWS], job[kernel.COLUMNS] = layout.rows, layout.columns
    job[kernel.PADDED_COLUMNS] = layout.padded_columns
    job[kernel.CODES], job[kernel.SCALES] = codes.ctypes.data, scales.ctypes.data
    task = kernel.packing_task(_elements(SOURCE_FORMATS[weights.dtype]), layout.format)
    chunks = -(-layout.rows // (BLOCK_ROWS if layout.packed.group_rows > 1 else TILE_ROWS))
    if pool is None:
        kernel.run_chunks(task, job.ctypes.data, chunks)
    else:
        pool.run(np.array([[task, job.ctypes.data, chunks]], np.int64))
    if job[kernel.REFUSED]:
        raise ValueError(
            f"weights: found NaN, infinity or magnitudes of 2^127 and more; {layout.format} needs finite weights"
        )


@cache
def _elements(format: str) -> Elements:
    return Elements(format, isa_of_format(format))
