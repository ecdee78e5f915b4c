# mypy: allow-untyped-defs
"""Kernels of `panel_mlp` for bf16 on CPUs with VDPBF16PS: panels hold pairs of bf16 columns, weights stay as they lie.

Jobs, chunks and panels of sums are those of `panel_kernel`; a panel of activations takes half of its room. A dot
product adds two products at a time, columns in ascending order from zero, in one chain: its bits depend neither on the
split of rows nor on other tokens.

Error of one dot product of length n, with u = 2**-24 and S = sum |w_i x_i|:
    |computed - exact| <= (n + 1) u S
VDPBF16PS reads denormal inputs as zero and flushes denormal results (`simd`).
"""

from __future__ import annotations

from functools import cache

from cpu_kernels.activation_kernel import gated_row, plain_row
from cpu_kernels.jit import carray, inner, task_address
from cpu_kernels.pair_panel_simd import (
    DEPTH,
    MIDDLE_TILE,
    NARROW_TILE,
    NEAR_ROW_BYTES,
    PAIR_BYTES,
    ROW_TILE,
    WIDE_TILE,
    activated_rows,
    near_weights,
    put_pair,
    tile_add_last,
    tile_add_pair,
    tile_load,
    tile_save,
    write_square,
)
from cpu_kernels.panel_kernel import (
    ACTIVATION,
    BIAS_OFFSET,
    COLUMNS,
    INPUT_PANELS,
    INPUT_STRIDE,
    JOB_FIELDS,
    MATRICES,
    OUTPUT_ROUNDED,
    OUTPUT_ROWS,
    PACK_FIELDS,
    PANELS,
    PANELS_TOGETHER,
    ROWS,
    SUM_PANELS,
    SUM_STRIDE,
    WEIGHTS_OFFSET,
    X_COLUMNS,
    X_PANELS,
    X_ROWS,
    add_bias,
    part_of_chunk,
    write_out,
)
from cpu_kernels.panel_simd import PANEL_COLUMN_BYTES
from cpu_kernels.simd import (
    LANES,
    STEP_BYTES,
    Elements,
    element_pointer,
    float32_pointer,
    int64_pointer,
    prefetch_four_lines,
    tile_zero,
)

BF16 = Elements("bf16", "avx512_bf16")

_TILE_ROWS, _WIDE_PANELS, _MIDDLE_PANELS = WIDE_TILE.rows, WIDE_TILE.tokens, MIDDLE_TILE.tokens
_ELEMENT_BYTES = 2
_NUMBERS_BYTES = _ELEMENT_BYTES * LANES


@inner
def pack_panel(job_address, chunk):
    """Up to 16 pairs' activations as one panel of pairs of columns; lanes and columns that are not there are zero."""
    job = carray(int64_pointer(job_address), (PACK_FIELDS,))
    entry = carray(int64_pointer(job[PANELS] + 16 * chunk), (2,))
    columns, pairs = job[X_COLUMNS], entry[1]
    rows = carray(int64_pointer(job[X_ROWS] + 8 * entry[0]), (pairs,))
    whole = columns // 2
    panel_address = job[X_PANELS] + chunk * columns * PANEL_COLUMN_BYTES
    panel = carray(float32_pointer(panel_address), ((columns + 1) // 2 * LANES,))
    if pairs < LANES or columns % 2 > 0:
        panel[:] = 0
    for pair in range(pairs):
        # Two columns are moved as one number of 32 bits, whatever it is.
        row = carray(float32_pointer(rows[pair]), (whole,))
        for i in range(whole):
            panel[i * LANES + pair] = row[i]
        if columns % 2 > 0:
            last = carray(element_pointer(BF16, rows[pair] + _ELEMENT_BYTES * (columns - 1)), (1,))
            carray(element_pointer(BF16, panel_address + whole * PAIR_BYTES), (2 * LANES,))[2 * pair] = last[0]


@inner
def _multiply(shape, weights, depth, inputs, input_stride, sums, sum_stride, fresh):
    """Sums of a tile's rows and panels, `depth` columns further."""
    tile = tile_zero(shape) if fresh else tile_load(shape, sums, sum_stride)
    for i in range(depth // 2):
        tile = tile_add_pair(tile, weights + 4 * i, inputs + PAIR_BYTES * i, input_stride)
    if depth % 2 > 0:
        last = depth // 2
        tile = tile_add_last(tile, weights + 4 * last, inputs + PAIR_BYTES * last, input_stride)
    tile_save(tile, sums, sum_stride)


@inner
def _multiply_panels(weights, rows, depth, inputs, input_stride, sums, sum_stride, panels, fresh):
    """Up to `_TILE_ROWS` rows times so many panels."""
    if rows < _TILE_ROWS:
        for row in range(rows):
            here, target = weights + row * NEAR_ROW_BYTES, sums + PANEL_COLUMN_BYTES * row
            for panel in range(panels):
                source, total = inputs + panel * input_stride, target + panel * sum_stride
                _multiply(ROW_TILE, here, depth, source, input_stride, total, sum_stride, fresh)
        return
    for panel in range(0, panels, _WIDE_PANELS):
        source, total = inputs + panel * input_stride, sums + panel * sum_stride
        left = panels - panel
        if left >= _WIDE_PANELS:
            _multiply(WIDE_TILE, weights, depth, source, input_stride, total, sum_stride, fresh)
        elif left == _MIDDLE_PANELS:
            _multiply(MIDDLE_TILE, weights, depth, source, input_stride, total, sum_stride, fresh)
        else:
            _multiply(NARROW_TILE, weights, depth, source, input_stride, total, sum_stride, fresh)


@inner
def _bring_near(weights, row_bytes, rows, depth, near):
    """Copy some rows of `depth` weights, NEAR_ROW_BYTES apart; those of the next tile are fetched."""
    for row in range(rows):
        here = weights + row * row_bytes
        for line in range(0, depth * _ELEMENT_BYTES, 4 * STEP_BYTES):
            prefetch_four_lines(here + rows * row_bytes + line)
        source = carray(element_pointer(BF16, here), (depth,))
        target = carray(element_pointer(BF16, near + NEAR_ROW_BYTES * row), (depth,))
        for i in range(depth):
            target[i] = source[i]


@inner
def _multiply_rows(weights, columns, rows, inputs, input_stride, sums, sum_stride, panels):
    """Sums of some rows for some panels; sums: address of the first row's in the first panel."""
    near = near_weights()
    row_bytes = columns * _ELEMENT_BYTES
    for start in range(0, columns, DEPTH):
        depth = min(DEPTH, columns - start)
        source = inputs + start // 2 * PAIR_BYTES
        for row in range(0, rows, _TILE_ROWS):
            count = min(_TILE_ROWS, rows - row)
            _bring_near(weights + row * row_bytes + start * _ELEMENT_BYTES, row_bytes, count, depth, near)
            target = sums + row * PANEL_COLUMN_BYTES
            _multiply_panels(near, count, depth, source, input_stride, target, sum_stride, panels, start == 0)


@inner
def _activate(job, sums, first, rows):
    """The activation of some rows of a panel of sums, as columns of the next panel of pairs.

    `first` is even, so that no pair is split between chunks.
    """
    here = sums + PANEL_COLUMN_BYTES * first
    matrix_bytes = PANEL_COLUMN_BYTES * job[ROWS]
    hidden = activated_rows()
    if job[MATRICES] == 2:
        gated_row(BF16, job[ACTIVATION], here, here + matrix_bytes, hidden, rows * LANES)
    else:
        plain_row(BF16, job[ACTIVATION], here, hidden, rows * LANES)
    panel = sums + matrix_bytes * job[MATRICES] + first // 2 * PAIR_BYTES
    for row in range(0, rows, 2):
        even = hidden + row * _NUMBERS_BYTES
        odd = even + _NUMBERS_BYTES if row + 1 < rows else 0
        put_pair(even, odd, panel + row // 2 * PAIR_BYTES)


@inner
def _write_sums(job, sums, output_rows, pairs, first, rows):
    """As `write_out`, 16 rows at a time where outputs are fp32."""
    in_squares = rows // LANES * LANES if job[OUTPUT_ROUNDED] == 0 else 0
    for row in range(first, first + in_squares, LANES):
        write_square(sums + PANEL_COLUMN_BYTES * row, output_rows, 4 * row, pairs)
    if in_squares < rows:
        write_out(BF16, job, sums, output_rows, pairs, first + in_squares, rows - in_squares)


@inner
def _finish(job, base, sums, output_rows, pairs, first, rows):
    """What follows the sums of some rows in one panel."""
    for matrix in range(job[MATRICES]):
        row = matrix * job[ROWS] + first
        if job[BIAS_OFFSET] > 0:
            bias = base + job[BIAS_OFFSET] + row * _ELEMENT_BYTES
            add_bias(BF16, bias, sums + PANEL_COLUMN_BYTES * row, rows)
        if job[OUTPUT_ROWS] > 0:
            _write_sums(job, sums, output_rows, pairs, row, rows)
    if job[OUTPUT_ROWS] == 0:
        _activate(job, sums, first, rows)


@inner
def run_chunk(job_address, chunk):
    """A block of rows of one expert: its dot products with all tokens, and what follows them."""
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    first, rows, base, first_pair, pairs, panel = part_of_chunk(job, chunk)
    for done in range(0, pairs, PANELS_TOGETHER * LANES):
        here = min(PANELS_TOGETHER * LANES, pairs - done)
        number = panel + done // LANES
        inputs = job[INPUT_PANELS] + number * job[INPUT_STRIDE]
        sums = job[SUM_PANELS] + number * job[SUM_STRIDE]
        for matrix in range(job[MATRICES]):
            row = matrix * job[ROWS] + first
            weights = base + job[WEIGHTS_OFFSET] + row * job[COLUMNS] * _ELEMENT_BYTES
            _multiply_rows(
                weights, job[COLUMNS], rows, inputs, job[INPUT_STRIDE], sums + row * PANEL_COLUMN_BYTES,
                job[SUM_STRIDE], (here + LANES - 1) // LANES,
            )  # fmt: skip
        for start in range(0, here, LANES):
            outputs = job[OUTPUT_ROWS] + 8 * (first_pair + done + start)
            _finish(job, base, sums, outputs, min(LANES, here - start), first, rows)
            sums += job[SUM_STRIDE]


@cache
def pack_pairs_task() -> int:
    """Address of the compiled task void(int64 job, int64 chunk) that packs panels; compiled or loaded on first use."""

    def task(job: int, chunk: int) -> None:
        pack_panel(job, chunk)

    return task_address(task)


@cache
def pair_panel_task() -> int:
    """Likewise for the task that multiplies."""

    def task(job: int, chunk: int) -> None:
        run_chunk(job, chunk)

    return task_address(task)
