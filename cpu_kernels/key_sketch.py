"""Estimates of the largest score that a query has in each block of a history, from sketches of its keys."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import key_sketch_kernel as kernel
from cpu_kernels.key_sketch_simd import SumsShape, table_places
from cpu_kernels.tensors import describe
from cpu_kernels.threads import Pool
from cpu_kernels.workspace import workspace
from formats.key_sketch import SketchLayout

Bytes = npt.NDArray[np.uint8]

# Blocks times rows times channels of a chunk: about 50 microseconds.
_CHUNK_SIZE = 32 * 8 * 128


_PLACES = torch.from_numpy(table_places()).clone()


@cache
def _task() -> int:
    return kernel.scores_task(SumsShape(1), SumsShape(2))


def sketch_blocks(keys: torch.Tensor, layout: SketchLayout) -> torch.Tensor:
    """Sketches of one block of some heads.

    Args:
        keys: fp32 [heads, block_tokens, width] on the CPU, contiguous.
        layout: of a sketch.

    Returns:
        uint8 [heads, layout.nbytes].

    Raises:
        ValueError: keys that do not fit the layout.
    """
    if (
        keys.shape[1:] != (layout.block_tokens, layout.width)
        or keys.dtype is not torch.float32
        or not keys.is_cpu
        or not keys.is_contiguous()
    ):
        raise ValueError(
            f"sketch_blocks: expected contiguous fp32 [heads, {layout.block_tokens}, {layout.width}] on the CPU, found "
            f"{describe(keys)}"
        )
    sketches = torch.zeros(len(keys), layout.nbytes, dtype=torch.uint8)
    found: Bytes = sketches.numpy()
    kernel.make_sketches(keys.numpy(), found, found.view(np.uint16), layout.columns)
    return sketches


def estimate_largest_scores(
    query: torch.Tensor, sketches: torch.Tensor, layout: SketchLayout, pool: Pool, into: torch.Tensor | None = None
) -> torch.Tensor:
    """The largest score, before scaling, that any query of a key-value head is estimated to have in each block.

    Products with spreads are rounded to integers, the largest sum of four of them to about 125; the error of each is at
    most half a unit. The bits do not depend on the number of threads.

    Args:
        query: [B, Hq, T, D] on the CPU, D = layout.width.
        sketches: uint8 [B, Hk, C, layout.nbytes], Hk a divisor of Hq, the sketches of a head contiguous.
        layout: of them.
        pool: the threads.
        into: contiguous fp32 [B, Hk, C] to write to; None for new memory.

    Returns:
        fp32 [B, Hk, C].

    Raises:
        ValueError: a shape, dtype or layout that does not fit.
    """
    batch, kv_heads, blocks, nbytes = sketches.shape
    if (
        query.ndim != 4
        or len(query) != batch
        or query.shape[1] % kv_heads
        or query.shape[3] != layout.width
        or nbytes != layout.nbytes
        or sketches.dtype is not torch.uint8
        or sketches.stride()[2:] != (nbytes, 1)
        or (batch > 1 and sketches.stride(0) != kv_heads * sketches.stride(1))
    ):
        raise ValueError(
            f"estimate_largest_scores: expected query [B, Hq, T, {layout.width}] and sketches uint8 [B, Hk, C, "
            f"{layout.nbytes}], those of a head contiguous, found {describe(query)} and {describe(sketches)}"
        )
    heads = batch * kv_heads
    split = query.reshape(heads, -1, layout.width)
    rows = torch.zeros(heads, split.shape[1], layout.columns)
    rows[..., : layout.width] = split
    out = torch.empty(batch, kv_heads, blocks) if into is None else into
    if out.shape != (batch, kv_heads, blocks) or out.dtype is not torch.float32 or not out.is_contiguous():
        raise ValueError(f"into: expected contiguous fp32 {[batch, kv_heads, blocks]}, found {describe(out)}")
    job = np.zeros(kernel.JOB_FIELDS, np.int64)
    job[kernel.QUERIES], job[kernel.ROWS], job[kernel.COLUMNS] = rows.data_ptr(), rows.shape[1], layout.columns
    job[kernel.SKETCHES], job[kernel.HEAD_STRIDE] = sketches.data_ptr(), sketches.stride(1)
    job[kernel.NBYTES], job[kernel.RUNS], job[kernel.RUN_NBYTES] = nbytes, layout.runs, layout.run_nbytes
    job[kernel.OUT], job[kernel.BLOCKS] = out.data_ptr(), blocks
    job[kernel.PLACES] = _PLACES.data_ptr()
    step = max(1, _CHUNK_SIZE // (rows.shape[1] * layout.columns))
    head_chunks = -(-blocks // step)
    scratch_nbytes = kernel.scratch_nbytes(layout.columns)
    scratch = workspace(heads * head_chunks * scratch_nbytes)
    job[kernel.CHUNK_BLOCKS], job[kernel.HEAD_CHUNKS] = step, head_chunks
    job[kernel.SCRATCH], job[kernel.SCRATCH_NBYTES] = scratch.ctypes.data, scratch_nbytes
    pool.run(np.array([[_task(), job.ctypes.data, heads * head_chunks]], np.int64))
    return out
