"""The MLPs of routed experts with packed weights, for any number of tokens, reading each expert's bundle in place.

`packed_expert_mlp` runs both projections; `packed_expert_up` and `packed_expert_down` are its halves, for activations
that are not fused.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels import expert_mlp_jobs, packed_jobs
from cpu_kernels.activation_quantisation_kernel import ELEMENT_NUMBERS, KINDS
from cpu_kernels.expert_mlp import (
    FLOAT32,
    INPUT_DTYPES,
    IntArray,
    activation_code,
    address_of,
    check_matrix,
    complaint,
    index_array,
)
from cpu_kernels.isa import converts_fp16
from cpu_kernels.packed_linear import code_of_format, tasks_of_format
from cpu_kernels.packed_simd import BLOCK_NBYTES
from cpu_kernels.threads import Pool, shared_pool
from cpu_kernels.workspace import workspace
from formats.bundle import BundleLayout
from formats.packed import COLUMN_BLOCK, PACKED_FORMATS

_FORMAT_OF_DTYPE = {dtype: name for name, dtype in INPUT_DTYPES.items()}


def packed_expert_mlp(
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
    """As `expert_mlp` for packed formats. For each pair p of expert e, with x_p = x[pair_tokens[p]]:

        h = act(gate_e q(x_p) + gate_bias_e) * (up_e q(x_p) + up_bias_e)    without a gate:
        h = act(up_e q(x_p) + up_bias_e)
        out[pair_rows[p]] = down_e q(h) + down_bias_e

    q rounds to int8 in groups of 64 (`activation_quantisation_kernel`), for fp8_e4m3 not at all; all else is fp32. The
    result has the same bits for any number of threads, for a token alone as together with others, and on every ISA.

    Args:
        bundles: [n] addresses of bundles in `layout`, which must stay valid and unchanged during the call.
        layout: of all bundles; a packed format.
        pair_offsets: [n + 1], from 0 to P, not decreasing.
        pair_tokens: [P], row of x for each pair.
        x: [T, H], each row contiguous; a dtype of INPUT_DTYPES (bf16 as its bits in uint16).
        activation: a name in ACTIVATION_CODES or ACTIVATION_ALIASES; `gpt_oss` needs a gate.
        out: float32 [P', H], each row contiguous; must not overlap x.
        pair_rows: [P], row of `out` for each pair; no row twice.
        threads: a pool, or the size of a pool that the process shares; None for the process's default.

    Raises:
        ValueError: a shape, type, index or name that does not fit.
    """
    code = activation_code(activation, layout)
    _run(layout, bundles, pair_offsets, pair_tokens, x, out, pair_rows, threads, up=True, down=True, activation=code)


def packed_expert_up(
    bundles: IntArray,
    layout: BundleLayout,
    pair_offsets: IntArray,
    pair_tokens: IntArray,
    x: npt.NDArray[Any],
    out: npt.NDArray[np.float32],
    *,
    threads: Pool | int | None = None,
) -> None:
    """Compute out[p] = gate_e q(x_p) + gate_bias_e | up_e q(x_p) + up_bias_e for each pair p of expert e.

    Nothing is activated.

    Args as for `packed_expert_mlp`, but out: float32 [P, 2 I], without a gate [P, I], each row contiguous.

    Raises:
        ValueError: a shape, type or index that does not fit.
    """
    rows = np.arange(len(pair_tokens))
    _run(layout, bundles, pair_offsets, pair_tokens, x, out, rows, threads, up=True, down=False)


def packed_expert_down(
    bundles: IntArray,
    layout: BundleLayout,
    pair_offsets: IntArray,
    h: npt.NDArray[Any],
    out: npt.NDArray[np.float32],
    pair_rows: IntArray,
    *,
    threads: Pool | int | None = None,
) -> None:
    """Compute out[pair_rows[p]] = down_e q(h[p]) + down_bias_e for each pair p of expert e.

    Args as for `packed_expert_mlp`, and h: [P, I] of a dtype of INPUT_DTYPES, each row contiguous.

    Raises:
        ValueError: a shape, type or index that does not fit.
    """
    tokens = np.arange(len(pair_rows))
    _run(layout, bundles, pair_offsets, tokens, h, out, pair_rows, threads, up=False, down=True)


def compile_packed_kernels(format: str) -> None:
    """Compile what a packed format needs, or load it from Numba's cache; calls do so on first use otherwise.

    Raises:
        ValueError: the format has no packed kernel.
    """
    layout = BundleLayout(COLUMN_BLOCK, COLUMN_BLOCK, format)
    none = np.zeros(0, np.int64)
    nothing = np.zeros((0, layout.hidden), np.float32)
    packed_expert_mlp(none, layout, np.zeros(1, np.int64), none, nothing, "silu", nothing.copy(), none, threads=1)


@cache
def packed_shape_of_layout(layout: BundleLayout) -> npt.NDArray[np.int64]:
    """What jobs need of a layout, int64 [SHAPE_FIELDS]; kept for the process."""
    if layout.format not in PACKED_FORMATS:
        raise ValueError(f"format {layout.format!r} is not packed; known: {', '.join(PACKED_FORMATS)}")
    parts = layout.components
    first = "gate" if layout.has_gate else "up"
    code = code_of_format(layout.format)
    shape = np.zeros(packed_jobs.SHAPE_FIELDS, np.int64)
    shape[packed_jobs.HIDDEN] = layout.hidden
    shape[packed_jobs.INTERMEDIATE] = layout.intermediate
    shape[packed_jobs.MATRICES] = 1 + layout.has_gate
    shape[packed_jobs.UP_CODES] = parts[first].offset
    shape[packed_jobs.UP_CODES_STRIDE] = parts["up"].offset - parts[first].offset
    shape[packed_jobs.UP_SCALES] = parts[f"{first}_scale"].offset
    shape[packed_jobs.UP_SCALES_STRIDE] = parts["up_scale"].offset - parts[f"{first}_scale"].offset
    shape[packed_jobs.DOWN_CODES] = parts["down"].offset
    shape[packed_jobs.DOWN_SCALES] = parts["down_scale"].offset
    if layout.has_bias:
        shape[packed_jobs.UP_BIAS] = parts[f"{first}_bias"].offset
        shape[packed_jobs.DOWN_BIAS] = parts["down_bias"].offset
    shape[packed_jobs.KIND] = KINDS[code.activation]
    shape[packed_jobs.CODES_NBYTES] = code.codes_nbytes
    return shape


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
    shape = packed_shape_of_layout(layout)
    element = _FORMAT_OF_DTYPE.get(x.dtype)
    if element is None or (element == "fp16" and not converts_fp16()):
        raise ValueError(f"x: expected one of {', '.join(INPUT_DTYPES)} that this CPU converts, found {x.dtype.name}")
    columns = layout.hidden if up else layout.intermediate
    up_columns = layout.intermediate * (1 + layout.has_gate)
    check_matrix("x" if up else "h", x, x.dtype, columns)
    check_matrix("out", out, FLOAT32, layout.hidden if down else up_columns)
    if not out.flags.writeable:
        raise ValueError("out: the array is read-only")
    bundles = index_array("bundles", bundles)
    experts, pairs = len(bundles), len(pair_tokens)
    offsets = index_array("pair_offsets", pair_offsets, experts + 1)
    tokens, rows = index_array("pair_tokens", pair_tokens), index_array("pair_rows", pair_rows, pairs)
    pool = shared_pool(threads) if threads is None or isinstance(threads, int) else threads
    activations_nbytes = min(pairs, x.shape[0]) * row_nbytes(columns, layout.format)
    sums_nbytes = 4 * pairs * (up_columns + layout.intermediate) if up and down else 0
    hidden_nbytes = pairs * row_nbytes(layout.intermediate, layout.format)
    scratch = workspace(8 * packed_jobs.expert_words(experts, pairs, activations_nbytes, sums_nbytes, hidden_nbytes))
    status = packed_jobs.prepare_experts(
        scratch, shape, tasks_of_format(layout.format), ELEMENT_NUMBERS[element], bundles, offsets,
        tokens, address_of(x), x.strides[0], x.shape[0],
        rows, address_of(out), out.strides[0], out.shape[0],
        up, down, activation, pool.threads,
    )  # fmt: skip
    if status != expert_mlp_jobs.FINE:
        raise ValueError(complaint(status, x, out, pairs, up=up))
    phases = 1 + up + down
    pool.run(scratch[packed_jobs.PHASES : packed_jobs.PHASES + 3 * phases].reshape(-1, 3))


def row_nbytes(columns: int, format: str) -> int:
    """Bytes of a token's activations as the kernels of a format take them."""
    return -(-columns // COLUMN_BLOCK) * BLOCK_NBYTES[code_of_format(format).activation]
