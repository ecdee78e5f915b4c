"""The MLPs of routed experts, and linear layers, for many tokens: blocked matrix products.

In fp32 for fp32 and for CPUs without instructions for 16-bit products, by pairs of bf16 where there is VDPBF16PS
(`pair_panel_kernel`). `expert_mlp` and `linear` are for few tokens: from some 8 on they are bound by arithmetic, and
read each weight's bits anew for every few tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import expert_mlp_jobs, panel_jobs
from cpu_kernels.expert_mlp import (
    FLOAT32,
    INPUT_DTYPES,
    IntArray,
    activation_code,
    address_of,
    check_matrix,
    complaint,
    index_array,
    shape_of_layout,
)
from cpu_kernels.isa import choose_isa, cpu_features, isa_of_format
from cpu_kernels.pair_panel_kernel import BF16, pack_pairs_task, pair_panel_task
from cpu_kernels.panel_kernel import PANEL_TOKENS, pack_task, panel_task
from cpu_kernels.panel_simd import PANEL_COLUMN_BYTES, tile_shape
from cpu_kernels.simd import Elements
from cpu_kernels.tensors import FORMAT_OF_DTYPE, describe, elements_of
from cpu_kernels.threads import Pool, shared_pool
from cpu_kernels.workspace import workspace
from formats.bundle import BundleLayout

_SCRATCH_NBYTES = 16 << 20
"""About what panels may take: pairs beyond it are computed afterwards, in the same memory."""

_FEWEST_TOGETHER = 64


def panel_expert_mlp(
    bundles: IntArray,
    layout: BundleLayout,
    pair_offsets: IntArray,
    pair_tokens: IntArray,
    x: npt.NDArray[Any],
    activation: str,
    out: npt.NDArray[np.float32],
    pair_rows: IntArray,
    *,
    threads: Pool | int | None = None,
) -> None:
    """As `expert_mlp`, for many tokens: sums have another order (`panel_kernel`), and so other last bits.

    The result has the same bits for any number of threads, and for a token alone as together with others.

    Raises:
        ValueError: a shape, type, index or name that does not fit.
    """
    code = activation_code(activation, layout)
    _run(layout, bundles, pair_offsets, pair_tokens, x, out, pair_rows, threads, up=True, down=True, activation=code)


def panel_expert_up(
    bundles: IntArray,
    layout: BundleLayout,
    pair_offsets: IntArray,
    pair_tokens: IntArray,
    x: npt.NDArray[Any],
    out: npt.NDArray[np.float32],
    *,
    threads: Pool | int | None = None,
) -> None:
    """As `expert_up`, for many tokens.

    Raises:
        ValueError: a shape, type or index that does not fit.
    """
    rows = np.arange(len(pair_tokens))
    _run(layout, bundles, pair_offsets, pair_tokens, x, out, rows, threads, up=True, down=False)


def panel_expert_down(
    bundles: IntArray,
    layout: BundleLayout,
    pair_offsets: IntArray,
    h: npt.NDArray[Any],
    out: npt.NDArray[np.float32],
    pair_rows: IntArray,
    *,
    threads: Pool | int | None = None,
) -> None:
    """As `expert_down`, for many tokens.

    Raises:
        ValueError: a shape, type or index that does not fit.
    """
    tokens = np.arange(len(pair_rows))
    _run(layout, bundles, pair_offsets, tokens, h, out, pair_rows, threads, up=False, down=True)


def panel_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pool: Pool) -> torch.Tensor:
    """Y = round(x W^T + b), sums and bias in fp32, for many tokens.

    Args:
        x: [..., K] on the CPU; bf16, fp16 or fp32.
        weight: [N, K], contiguous, of the same dtype.
        bias: [N], contiguous, of the same dtype, or None.
        pool: the threads.

    Returns:
        [..., N] of the same dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
    """
    rows, columns = weight.shape
    dtype = x.dtype
    if (
        x.shape[-1] != columns
        or weight.dtype is not dtype
        or not (x.is_cpu and weight.is_cpu and weight.is_contiguous())
        or (bias is not None and (bias.dtype is not dtype or bias.shape != (rows,) or not bias.is_contiguous()))
    ):
        raise ValueError(
            "panel_linear: expected x [..., K], contiguous weight [N, K] and bias [N] of one dtype on the CPU, found "
            f"{describe(x)}, {describe(weight)}, {'none' if bias is None else describe(bias)}"
        )
    flat = x.reshape(-1, columns).contiguous()
    out = x.new_empty(len(flat), rows)
    shape = np.zeros(expert_mlp_jobs.SHAPE_FIELDS, np.int64)
    shape[expert_mlp_jobs.HIDDEN], shape[expert_mlp_jobs.INTERMEDIATE] = rows, columns
    shape[expert_mlp_jobs.DOWN_OFFSET] = weight.data_ptr()
    shape[expert_mlp_jobs.DOWN_BIAS_OFFSET] = 0 if bias is None else bias.data_ptr()
    tasks = _tasks(elements_of(dtype))
    nbytes = dtype.itemsize
    most = _pairs_together(columns + rows)
    for first in range(0, len(flat), most):
        count = min(most, len(flat) - first)
        own = np.arange(count)
        scratch = workspace(8 * panel_jobs.panel_words(1, count, columns + rows))
        panel_jobs.prepare(
            scratch, shape, tasks, np.zeros(1, np.int64), np.array([0, count]),
            own, flat.data_ptr() + first * columns * nbytes, columns * nbytes, count,
            own, out.data_ptr() + first * rows * nbytes, rows * nbytes, count,
            False, True, 0, dtype is not torch.float32, pool.threads,
        )  # fmt: skip
        pool.run(scratch[panel_jobs.PHASES : panel_jobs.PHASES + 6].reshape(-1, 3))
    return out.view(*x.shape[:-1], rows)


def compile_panel_kernels(format: str) -> None:
    """Compile what an element format needs, or load it from Numba's cache; calls do so on first use otherwise.

    Raises:
        ValueError: the format has no kernel.
    """
    if format not in INPUT_DTYPES:
        raise ValueError(f"format {format!r} has no panel kernel; known: {', '.join(INPUT_DTYPES)}")
    dtype = next(dtype for dtype, name in FORMAT_OF_DTYPE.items() if name == format)
    panel_linear(torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype), None, shared_pool(1))


@cache
def multiplies_pairs() -> bool:
    """Whether panels of bf16 are multiplied by VDPBF16PS and there is no AMX, which torch's products use, faster."""
    return Elements("bf16", isa_of_format("bf16")) == BF16 and "amx-bf16" not in cpu_features()


@cache
def _tasks(elements: Elements) -> npt.NDArray[np.int64]:
    if elements == BF16:
        return np.array([pack_pairs_task(), pair_panel_task()], np.int64)
    return np.array([pack_task(elements), panel_task(elements, tile_shape(choose_isa()))], np.int64)


def _pairs_together(columns: int) -> int:
    """Pairs of one run; columns: of all their panels."""
    most = _SCRATCH_NBYTES // (columns * PANEL_COLUMN_BYTES // PANEL_TOKENS)
    return max(_FEWEST_TOGETHER, most // PANEL_TOKENS * PANEL_TOKENS)


def _runs(offsets: npt.NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most so many pairs, which end where an expert does unless it has more by itself."""
    start, pairs = 0, int(offsets[-1])
    while start < pairs:
        end = min(start + most, pairs)
        whole = int(offsets[np.searchsorted(offsets, end, side="right") - 1])
        end = whole if whole > start else end
        yield start, end
        start = end


def _run(
    layout: BundleLayout,
    bundles: IntArray,
    pair_offsets: IntArray,
    pair_tokens: IntArray,
    x: npt.NDArray[Any],
    out: npt.NDArray[np.float32],
    pair_rows: IntArray,
    threads: Pool | int | None,
    *,
    up: bool,
    down: bool,
    activation: int = 0,
) -> None:
    shape = shape_of_layout(layout)
    up_columns = layout.intermediate * (1 + layout.has_gate)
    check_matrix("x" if up else "h", x, INPUT_DTYPES[layout.format], layout.hidden if up else layout.intermediate)
    check_matrix("out", out, FLOAT32, layout.hidden if down else up_columns)
    if not out.flags.writeable:
        raise ValueError("out: the array is read-only")
    bundles = index_array("bundles", bundles)
    pairs = len(pair_tokens)
    offsets = index_array("pair_offsets", pair_offsets, len(bundles) + 1)
    tokens, rows = index_array("pair_tokens", pair_tokens), index_array("pair_rows", pair_rows, pairs)
    if offsets[0] != 0 or offsets[-1] != pairs or (np.diff(offsets) < 0).any():
        raise ValueError(complaint(expert_mlp_jobs.BAD_OFFSETS, x, out, pairs, up=up))
    pool = shared_pool(threads) if threads is None or isinstance(threads, int) else threads
    tasks = _tasks(Elements(layout.format, isa_of_format(layout.format)))
    columns = layout.hidden + up_columns + layout.intermediate * (up and down)
    for start, end in _runs(offsets, _pairs_together(columns)):
        first, last = np.searchsorted(offsets, [start, end - 1], side="right") - 1
        own = np.clip(offsets[first : last + 2], start, end) - start
        scratch = workspace(8 * panel_jobs.panel_words(len(own) - 1, end - start, columns))
        status = panel_jobs.prepare(
            scratch, shape, tasks, bundles[first : last + 1], own,
            tokens[start:end], address_of(x), x.strides[0], x.shape[0],
            rows[start:end], address_of(out), out.strides[0], out.shape[0],
            up, down, activation, False, pool.threads,
        )  # fmt: skip
        if status != expert_mlp_jobs.FINE:
            raise ValueError(complaint(status, x, out, pairs, up=up))
        phases = scratch[panel_jobs.PHASES : panel_jobs.PHASES + (9 if up and down else 6)].reshape(-1, 3)
        pool.run(phases)
