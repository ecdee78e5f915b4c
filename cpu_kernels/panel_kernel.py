# mypy: allow-untyped-defs
"""Kernels of `panel_mlp`: a block of weight rows times all tokens of an expert, 16 of them in the lanes of a register.

Activations are packed into panels first (`panel_simd`). The sums of the up projection, activated, are the panels of
the down projection as they lie. A dot product takes DEPTH columns at a time, by fused multiply-adds in ascending order
from zero, and adds these parts in ascending order: its bits depend neither on the split of rows nor on other tokens.

Error of one dot product of length n, with u = 2**-24 and S = sum |w_i x_i|:
    |computed - exact| <= (min(n, DEPTH) + n / DEPTH + 1) u S
"""

from __future__ import annotations

from functools import cache

from cpu_kernels.activation_kernel import gated_row, plain_row
from cpu_kernels.jit import carray, inner, task_address
from cpu_kernels.panel_simd import (
    DEPTH,
    HALF_LANES,
    HALF_TILE,
    PANEL_COLUMN_BYTES,
    ROWS_TOGETHER,
    half_tile_add_column,
    half_tile_put,
    rows_of_tile,
    tile_add_column,
    tile_put,
    wide_weights,
)
from cpu_kernels.simd import (
    LANES,
    STEP_BYTES,
    Elements,
    TileShape,
    element_pointer,
    element_to_float32,
    elements_per_step,
    float32_pointer,
    float32_to_element,
    int64_pointer,
    prefetch_four_lines,
    tile_zero,
)

PANEL_TOKENS = LANES
FP32 = Elements("fp32", "generic")

# Fields of a job that packs: a chunk is a panel.
(
    PANELS,  # address of a table [n, 2] of int64: first pair, pairs
    X_ROWS,  # address of a table of int64, the address of each pair's activations
    X_COLUMNS,
    X_PANELS,  # address of the first panel
    PACK_FIELDS,
) = range(5)

# Fields of a job that multiplies: a chunk is a block of rows of one expert.
(
    EXPERTS,  # address of a table [n, 4] of int64: address of weights' base, first pair, pairs, first panel
    CHUNKS_PER_EXPERT,
    ROWS_PER_CHUNK,
    ROWS,  # of one matrix
    COLUMNS,
    MATRICES,  # 2: gate and up, 1: any
    WEIGHTS_OFFSET,  # bytes from the base to the first matrix; the second follows it
    BIAS_OFFSET,  # likewise; 0 where there is no bias
    INPUT_PANELS,
    INPUT_STRIDE,  # bytes from a panel to the next
    SUM_PANELS,  # rows of the first matrix, of the second, and room for the activation
    SUM_STRIDE,
    OUTPUT_ROWS,  # address of a table of int64, the address of each pair's output; 0: activate instead
    OUTPUT_ROUNDED,  # 1: outputs are elements, 0: fp32
    ACTIVATION,
    JOB_FIELDS,
) = range(16)

# Panels that pass a block of rows before the next columns do: 8 KiB each, in the second-level cache.
PANELS_TOGETHER = 24


@inner
def pack_panel(elements, job_address, chunk):
    """Up to 16 pairs' activations as one panel of fp32; lanes without a pair are zero."""
    job = carray(int64_pointer(job_address), (PACK_FIELDS,))
    entry = carray(int64_pointer(job[PANELS] + 16 * chunk), (2,))
    columns, pairs = job[X_COLUMNS], entry[1]
    rows = carray(int64_pointer(job[X_ROWS] + 8 * entry[0]), (pairs,))
    panel = carray(float32_pointer(job[X_PANELS] + chunk * columns * PANEL_COLUMN_BYTES), (columns * LANES,))
    if pairs < LANES:
        panel[:] = 0
    for pair in range(pairs):
        row = carray(element_pointer(elements, rows[pair]), (columns,))
        for i in range(columns):
            panel[i * LANES + pair] = element_to_float32(elements, row[i])


@inner
def _widen(elements, weights, row_bytes, rows, depth, wide):
    """Rows of `depth` weights as fp32, DEPTH apart; those of the next tile are fetched."""
    for row in range(rows):
        here = weights + row * row_bytes
        prefetch_four_lines(here + rows * row_bytes)
        source = carray(element_pointer(elements, here), (depth,))
        target = carray(float32_pointer(wide + 4 * DEPTH * row), (depth,))
        for i in range(depth):
            target[i] = element_to_float32(elements, source[i])


@inner
def _multiply_tile(shape, wide, panel, depth):
    tile = tile_zero(shape)
    for i in range(depth):
        tile = tile_add_column(tile, wide + 4 * i, panel + PANEL_COLUMN_BYTES * i)
    return tile


@inner
def _multiply_half_tile(wide, panel, depth):
    tile = tile_zero(HALF_TILE)
    for i in range(depth):
        tile = half_tile_add_column(tile, wide + 4 * i, panel + PANEL_COLUMN_BYTES * i)
    return tile


@inner
def _multiply_panel(shape, wide, rows, panel, depth, sums, pairs, fresh):
    """Up to ROWS_TOGETHER rows of widened weights times one panel of so many pairs."""
    if pairs <= HALF_LANES:
        half_tile_put(_multiply_half_tile(wide, panel, depth), sums, rows, fresh)
    else:
        for row in range(0, rows, rows_of_tile(shape)):
            tile = _multiply_tile(shape, wide + 4 * DEPTH * row, panel, depth)
            tile_put(tile, sums + PANEL_COLUMN_BYTES * row, rows - row, fresh)


@inner
def _multiply_rows(elements, shape, weights, columns, rows, inputs, input_stride, sums, sum_stride, pairs):
    """Sums of some rows for the panels of some pairs; sums: address of the first row's in the first panel."""
    wide = wide_weights()
    element_bytes = STEP_BYTES // elements_per_step(elements)
    row_bytes = columns * element_bytes
    for start in range(0, columns, DEPTH):
        depth = min(DEPTH, columns - start)
        for row in range(0, rows, ROWS_TOGETHER):
            count = min(ROWS_TOGETHER, rows - row)
            here = weights + row * row_bytes + start * element_bytes
            _widen(elements, here, row_bytes, count, depth, wide)
            panel = inputs + start * PANEL_COLUMN_BYTES
            target = sums + row * PANEL_COLUMN_BYTES
            for done in range(0, pairs, LANES):
                _multiply_panel(shape, wide, count, panel, depth, target, pairs - done, start == 0)
                panel += input_stride
                target += sum_stride


@inner
def add_bias(elements, bias_address, sums_address, rows):
    """The bias of some rows to all sums of a panel."""
    bias = carray(element_pointer(elements, bias_address), (rows,))
    sums = carray(float32_pointer(sums_address), (rows * LANES,))
    for row in range(rows):
        value = element_to_float32(elements, bias[row])
        for lane in range(LANES):
            sums[row * LANES + lane] += value


@inner
def _activate(elements, job, sums, first, rows):
    """The activation of some rows of a panel of sums, rounded to elements and held as fp32."""
    here = sums + PANEL_COLUMN_BYTES * first
    matrix_bytes = PANEL_COLUMN_BYTES * job[ROWS]
    hidden = here + matrix_bytes * job[MATRICES]
    if job[MATRICES] == 2:
        gated_row(FP32, job[ACTIVATION], here, here + matrix_bytes, hidden, rows * LANES)
    else:
        plain_row(FP32, job[ACTIVATION], here, hidden, rows * LANES)
    values = carray(float32_pointer(hidden), (rows * LANES,))
    for i in range(rows * LANES):
        values[i] = element_to_float32(elements, float32_to_element(elements, values[i]))


@inner
def write_out(elements, job, sums, output_rows, pairs, first, rows):
    """Some rows of a panel of sums to the outputs of its pairs."""
    values = carray(float32_pointer(sums + PANEL_COLUMN_BYTES * first), (rows * LANES,))
    addresses = carray(int64_pointer(output_rows), (pairs,))
    for pair in range(pairs):
        if job[OUTPUT_ROUNDED] > 0:
            element_bytes = STEP_BYTES // elements_per_step(elements)
            rounded = carray(element_pointer(elements, addresses[pair] + element_bytes * first), (rows,))
            for row in range(rows):
                rounded[row] = float32_to_element(elements, values[row * LANES + pair])
        else:
            out = carray(float32_pointer(addresses[pair] + 4 * first), (rows,))
            for row in range(rows):
                out[row] = values[row * LANES + pair]


@inner
def _finish(elements, job, base, sums, output_rows, pairs, first, rows):
    """What follows the sums of some rows in one panel."""
    for matrix in range(job[MATRICES]):
        row = matrix * job[ROWS] + first
        if job[BIAS_OFFSET] > 0:
            bias = base + job[BIAS_OFFSET] + row * (STEP_BYTES // elements_per_step(elements))
            add_bias(elements, bias, sums + PANEL_COLUMN_BYTES * row, rows)
        if job[OUTPUT_ROWS] > 0:
            write_out(elements, job, sums, output_rows, pairs, row, rows)
    if job[OUTPUT_ROWS] == 0:
        _activate(elements, job, sums, first, rows)


@inner
def part_of_chunk(job, chunk):
    """(first row, rows, address of the weights' base, first pair, pairs, first panel) of a chunk."""
    expert = chunk // job[CHUNKS_PER_EXPERT]
    first = (chunk - expert * job[CHUNKS_PER_EXPERT]) * job[ROWS_PER_CHUNK]
    rows = min(job[ROWS_PER_CHUNK], job[ROWS] - first)
    entry = carray(int64_pointer(job[EXPERTS] + 32 * expert), (4,))
    return first, rows, entry[0], entry[1], entry[2], entry[3]


@inner
def run_chunk(elements, shape, job_address, chunk):
    """A block of rows of one expert: its dot products with all tokens, and what follows them."""
    job = carray(int64_pointer(job_address), (JOB_FIELDS,))
    first, rows, base, first_pair, pairs, panel = part_of_chunk(job, chunk)
    row_bytes = job[COLUMNS] * (STEP_BYTES // elements_per_step(elements))
    for done in range(0, pairs, PANELS_TOGETHER * LANES):
        here = min(PANELS_TOGETHER * LANES, pairs - done)
        number = panel + done // LANES
        inputs = job[INPUT_PANELS] + number * job[INPUT_STRIDE]
        sums = job[SUM_PANELS] + number * job[SUM_STRIDE]
        for matrix in range(job[MATRICES]):
            row = matrix * job[ROWS] + first
            weights = base + job[WEIGHTS_OFFSET] + row * row_bytes
            _multiply_rows(
                elements, shape, weights, job[COLUMNS], rows, inputs, job[INPUT_STRIDE],
                sums + row * PANEL_COLUMN_BYTES, job[SUM_STRIDE], here,
            )  # fmt: skip
        for start in range(0, here, LANES):
            outputs = job[OUTPUT_ROWS] + 8 * (first_pair + done + start)
            _finish(elements, job, base, sums, outputs, min(LANES, here - start), first, rows)
            sums += job[SUM_STRIDE]


@cache
def pack_task(elements: Elements) -> int:
    """Address of the compiled task void(int64 job, int64 chunk) that packs panels; compiled or loaded on first use."""

    def task(job: int, chunk: int) -> None:
        pack_panel(elements, job, chunk)

    return task_address(task)


@cache
def panel_task(elements: Elements, shape: TileShape) -> int:
    """Likewise for the task that multiplies."""

    def task(job: int, chunk: int) -> None:
        run_chunk(elements, shape, job, chunk)

    return task_address(task)
