"""The MLPs of routed experts for few tokens, reading each expert's bundle in place.

`expert_mlp` runs both projections; `expert_up` and `expert_down` are its halves, for activations that are not fused.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels import expert_mlp_jobs as jobs
from cpu_kernels.activation_kernel import ACTIVATION_ALIASES, ACTIVATION_CODES
from cpu_kernels.expert_mlp_kernel import rows_task
from cpu_kernels.isa import isa_of_format
from cpu_kernels.simd import Elements
from cpu_kernels.threads import Pool, shared_pool
from cpu_kernels.workspace import workspace
from formats.bundle import BundleLayout

IntArray = npt.NDArray[np.integer[Any]]

INPUT_DTYPES: dict[str, np.dtype[Any]] = {
    "bf16": np.dtype(np.uint16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}
FLOAT32 = np.dtype(np.float32)


def expert_mlp(
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
    """Compute the experts of P (token, expert) pairs that are sorted by expert.

    For each pair p of expert e, where pair_offsets[e] <= p < pair_offsets[e + 1], with x_p = x[pair_tokens[p]]:

        h = round(act(gate_e x_p + gate_bias_e) * (up_e x_p + up_bias_e))    without a gate:
        h = round(act(up_e x_p + up_bias_e))
        out[pair_rows[p]] = down_e h + down_bias_e

    Sums, biases and activations are fp32; only h is rounded, to the layout's element type. The result is not
    multiplied by a routing weight. It has the same bits for any number of threads, and for a token alone as
    together with others. Rows of `out` that no pair names stay as they are.

    Args:
        bundles: [n] addresses of bundles in `layout`, which must stay valid and unchanged during the call.
        layout: of all bundles; format bf16, fp16 or fp32.
        pair_offsets: [n + 1], from 0 to P, not decreasing.
        pair_tokens: [P], row of x for each pair.
        x: [T, H] of the layout's element type (INPUT_DTYPES: bf16 as its bits in uint16), each row contiguous.
        activation: a name in ACTIVATION_CODES or ACTIVATION_ALIASES; `gpt_oss` needs a gate.
        out: float32 [P', H], each row contiguous; must not overlap x.
        pair_rows: [P], row of `out` for each pair; no row twice.
        threads: a pool, or the size of a pool that the process shares; None for the process's default.

    Raises:
        ValueError: a shape, type, index or name that does not fit.
    """
    code = activation_code(activation, layout)
    _run(layout, bundles, pair_offsets, pair_tokens, x, out, pair_rows, threads, up=True, down=True, activation=code)


def expert_up(
    bundles: IntArray,
    layout: BundleLayout,
    pair_offsets: IntArray,
    pair_tokens: IntArray,
    x: npt.NDArray[Any],
    out: npt.NDArray[np.float32],
    *,
    threads: Pool | int | None = None,
) -> None:
    """out[p] = gate_e x_p + gate_bias_e | up_e x_p + up_bias_e for each pair p of expert e, not activated.

    Args as for `expert_mlp`, but out: float32 [P, 2 I], without a gate [P, I], each row contiguous.

    Raises:
        ValueError: a shape, type or index that does not fit.
    """
    rows = np.arange(len(pair_tokens))
    _run(layout, bundles, pair_offsets, pair_tokens, x, out, rows, threads, up=True, down=False)


def expert_down(
    bundles: IntArray,
    layout: BundleLayout,
    pair_offsets: IntArray,
    h: npt.NDArray[Any],
    out: npt.NDArray[np.float32],
    pair_rows: IntArray,
    *,
    threads: Pool | int | None = None,
) -> None:
    """out[pair_rows[p]] = down_e h[p] + down_bias_e for each pair p of expert e.

    Args as for `expert_mlp`, and h: [P, I] of the layout's element type, each row contiguous.

    Raises:
        ValueError: a shape, type or index that does not fit.
    """
    tokens = np.arange(len(pair_rows))
    _run(layout, bundles, pair_offsets, tokens, h, out, pair_rows, threads, up=False, down=True)


def activation_code(activation: str, layout: BundleLayout) -> int:
    """The kernel's number of an activation.

    Raises:
        ValueError: an unknown name, or an activation of two factors for experts without a gate.
    """
    code = ACTIVATION_CODES.get(ACTIVATION_ALIASES.get(activation, activation))
    if code is None:
        known = ", ".join([*ACTIVATION_CODES, *ACTIVATION_ALIASES])
        raise ValueError(f"activation {activation!r} has no kernel; known: {known}")
    if activation == "gpt_oss" and not layout.has_gate:
        raise ValueError("activation 'gpt_oss' multiplies gate and up, but the layout has no gate")
    return code


def compile_kernels(layout: BundleLayout) -> None:
    """Compile what this layout's format needs, or load it from Numba's cache; calls do so on first use otherwise.

    Raises:
        ValueError: the format has no kernel.
    """
    empty = np.zeros((0, layout.hidden), INPUT_DTYPES[_format(layout)])
    none = np.zeros(0, np.int64)
    out = np.zeros((0, layout.hidden), np.float32)
    expert_mlp(none, layout, np.zeros(1, np.int64), none, empty, "silu", out, none, threads=1)


def _format(layout: BundleLayout) -> str:
    if layout.format not in INPUT_DTYPES:
        raise ValueError(f"format {layout.format!r} has no expert kernel; known: {', '.join(INPUT_DTYPES)}")
    return layout.format


@cache
def shape_of_layout(layout: BundleLayout) -> npt.NDArray[np.int64]:
    """What jobs need of a layout, int64 [SHAPE_FIELDS]; kept for the process."""
    components = layout.components
    first, first_bias = ("gate", "gate_bias") if layout.has_gate else ("up", "up_bias")
    shape = np.zeros(jobs.SHAPE_FIELDS, np.int64)
    shape[jobs.HIDDEN] = layout.hidden
    shape[jobs.INTERMEDIATE] = layout.intermediate
    shape[jobs.GATED] = layout.has_gate
    shape[jobs.ELEMENT_BYTES] = INPUT_DTYPES[_format(layout)].itemsize
    shape[jobs.UP_OFFSET] = components[first].offset
    shape[jobs.DOWN_OFFSET] = components["down"].offset
    if layout.has_bias:
        shape[jobs.UP_BIAS_OFFSET] = components[first_bias].offset
        shape[jobs.DOWN_BIAS_OFFSET] = components["down_bias"].offset
    return shape


@cache
def task_of_format(format: str) -> int:
    """Address of the compiled task of an element format."""
    return rows_task(Elements(format, isa_of_format(format)))


def check_matrix(name: str, array: npt.NDArray[Any], dtype: np.dtype[Any], columns: int) -> None:
    """Raise ValueError unless `array` is [rows, columns] of `dtype` with contiguous rows."""
    if array.dtype != dtype or array.ndim != 2 or array.shape[1] != columns:
        raise ValueError(f"{name}: expected {dtype.name} [rows, {columns}], found {array.dtype.name} {array.shape}")
    if array.strides[1] != dtype.itemsize and array.size and columns > 1:
        raise ValueError(f"{name}: the elements of a row must be contiguous, found strides {array.strides}")


def index_array(name: str, array: IntArray, length: int | None = None) -> npt.NDArray[np.int64]:
    """`array` as contiguous int64; ValueError unless it holds integers, `length` of them where that is given."""
    if array.ndim != 1 or array.dtype.kind not in "iu" or (length is not None and len(array) != length):
        expected = "n" if length is None else length
        raise ValueError(f"{name}: expected integers [{expected}], found {array.dtype.name} {array.shape}")
    return np.ascontiguousarray(array, np.int64)


def address_of(array: npt.NDArray[Any]) -> int:
    """Address of the first element."""
    return int(array.__array_interface__["data"][0])


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
    dtype = INPUT_DTYPES[layout.format]
    check_matrix("x" if up else "h", x, dtype, layout.hidden if up else layout.intermediate)
    check_matrix("out", out, FLOAT32, layout.hidden if down else up_columns)
    if not out.flags.writeable:
        raise ValueError("out: the array is read-only")
    bundles = index_array("bundles", bundles)
    experts, pairs = len(bundles), len(pair_tokens)
    offsets = index_array("pair_offsets", pair_offsets, experts + 1)
    tokens, rows = index_array("pair_tokens", pair_tokens), index_array("pair_rows", pair_rows, pairs)
    pool = shared_pool(threads) if threads is None or isinstance(threads, int) else threads
    nbytes = 8 * jobs.workspace_words(experts, pairs)
    if up and down:
        nbytes += pairs * (4 * up_columns + dtype.itemsize * layout.intermediate)
    scratch = workspace(nbytes)
    status = jobs.prepare(
        scratch, shape, task_of_format(layout.format), bundles, offsets,
        tokens, address_of(x), x.strides[0], x.shape[0],
        rows, address_of(out), out.strides[0], out.shape[0],
        up, down, activation, pool.threads,
    )  # fmt: skip
    if status != jobs.FINE:
        raise ValueError(complaint(status, x, out, pairs, up=up))
    phases = scratch[jobs.PHASES : jobs.PHASES + (6 if up and down else 3)].reshape(-1, 3)
    pool.run(phases)


def complaint(status: int, x: npt.NDArray[Any], out: npt.NDArray[Any], pairs: int, *, up: bool) -> str:
    """What was wrong with a call, from the status that the preparation of its jobs returned."""
    if status == jobs.BAD_OFFSETS:
        return f"pair_offsets: expected to rise from 0 to the number of pairs, {pairs}"
    if status == jobs.BAD_TOKEN:
        return f"{'pair_tokens' if up else 'h'}: a pair has no row among the {x.shape[0]} inputs"
    return f"pair_rows: a pair has no row among the {out.shape[0]} of out"
