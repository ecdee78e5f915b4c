# mypy: allow-untyped-defs
"""Tables and jobs of packed kernels, filled and, for a linear layer, started by compiled code."""

from __future__ import annotations

from cpu_kernels import activation_quantisation_kernel as quantisation
from cpu_kernels import packed_kernel as kernel
from cpu_kernels.activation_quantisation_kernel import block_nbytes
from cpu_kernels.chunk_runs import count_runs
from cpu_kernels.expert_mlp_jobs import (
    BAD_OFFSETS,
    BAD_ROW,
    BAD_TOKEN,
    FINE,
    are_even,
    fill_consecutive,
    fill_experts,
    fill_rows,
)
from cpu_kernels.jit import entry, inner
from cpu_kernels.launch import launch
from formats.packed import COLUMN_BLOCK, TILE_ROWS

# A chunk should be long against the claim of it (0.1 us) and short against a phase.
_CHUNK_BYTES = 128 << 10
_CHUNKS_PER_THREAD = 8
# Below this, starting a region of threads takes longer than what a second thread saves.
_ONE_THREAD_BYTES = 64 << 10
_QUANTISED_AT_ONCE = 8


@inner
def blocks_of(columns):
    """Blocks of 64 columns."""
    return (columns + COLUMN_BLOCK - 1) // COLUMN_BLOCK


@inner
def fill_quantisation(job, kind, element, x, x_row_bytes, rows, tokens, columns, blocks):
    """Enter a job of quantisation; returns its chunks. rows: address of the table of rows, or 0."""
    job[quantisation.KIND] = kind
    job[quantisation.ELEMENT] = element
    job[quantisation.X] = x
    job[quantisation.X_ROW_BYTES] = x_row_bytes
    job[quantisation.TOKENS] = tokens
    job[quantisation.COLUMNS] = columns
    job[quantisation.BLOCKS] = blocks
    job[quantisation.TOKENS_PER_CHUNK] = _QUANTISED_AT_ONCE
    job[quantisation.ROWS] = rows
    return (tokens + _QUANTISED_AT_ONCE - 1) // _QUANTISED_AT_ONCE


@inner
def split_tiles(job, active, tile_nbytes, granularity, threads, even):
    """Enter how row tiles are split, in multiples of `granularity`; returns how many pieces threads take.

    tile_nbytes: bytes of codes of one row tile, of both matrices where there are two. even: whether all tiles cost
    about the same.
    """
    tiles = (job[kernel.ROWS] + TILE_ROWS - 1) // TILE_ROWS
    total = active * tiles * tile_nbytes
    nbytes = min(_CHUNK_BYTES, total // (threads * _CHUNKS_PER_THREAD)) if total > _ONE_THREAD_BYTES else total
    per_chunk = max(1, nbytes // tile_nbytes // granularity) * granularity
    job[kernel.TILES_PER_CHUNK] = per_chunk
    job[kernel.CHUNKS_PER_EXPERT] = (tiles + per_chunk - 1) // per_chunk
    chunks = active * job[kernel.CHUNKS_PER_EXPERT]
    job[kernel.CHUNKS] = chunks
    job[kernel.RUN_THREADS] = threads if even else 0
    return count_runs(chunks, threads) if even else chunks


_I64S = ", ".join(["int64"] * 14)


@entry(f"void(int64, int64, int64, int64[::1], {_I64S}, int64[::1])")
def run_linear(
    launcher,
    state,
    threads,
    tasks,
    kind,
    tile_bytes_of_block,
    element,
    output,
    x,
    x_row_bytes,
    tokens,
    codes,
    scales,
    bias,
    rows,
    columns,
    out,
    out_row_bytes,
    workspace,
):
    """Compute out [tokens, rows] = x [tokens, columns] times packed weights, plus bias.

    launcher, state: of the pool, whose threads are `threads`. tasks: addresses of quantisation and of the format's
    task. kind: of activation blocks. tile_bytes_of_block: bytes of codes of a block. element, output: numbers of the
    types of x and of out. codes, scales, bias, x, out: addresses. workspace: int64, `linear_words`.
    """
    blocks = blocks_of(columns)
    row_nbytes = blocks * block_nbytes(kind)
    quantise = workspace[: quantisation.JOB_FIELDS]
    job = workspace[quantisation.JOB_FIELDS : quantisation.JOB_FIELDS + kernel.JOB_FIELDS]
    expert = quantisation.JOB_FIELDS + kernel.JOB_FIELDS
    tables = expert + 3
    words = (tables + 3 * tokens + 7) // 8 * 8
    base = workspace.ctypes.data
    activations = base + 8 * words
    sums = activations + tokens * row_nbytes if output != kernel.SUMS else out
    sum_row_bytes = 4 * rows if output != kernel.SUMS else out_row_bytes
    for token in range(tokens):
        workspace[tables + token] = activations + token * row_nbytes
        workspace[tables + tokens + token] = sums + token * sum_row_bytes
        workspace[tables + 2 * tokens + token] = out + token * out_row_bytes
    workspace[expert], workspace[expert + 1], workspace[expert + 2] = 0, 0, tokens
    job[kernel.EXPERTS] = base + 8 * expert
    job[kernel.ROWS] = rows
    job[kernel.BLOCKS] = blocks
    job[kernel.MATRICES] = 1
    job[kernel.CODES] = codes
    job[kernel.SCALES] = scales
    job[kernel.BIAS] = bias
    job[kernel.INPUT_ROWS] = base + 8 * tables
    job[kernel.SUM_ROWS] = base + 8 * (tables + tokens)
    job[kernel.OUTPUT_ROWS] = base + 8 * (tables + 2 * tokens)
    job[kernel.OUTPUT] = output
    chunks = fill_quantisation(quantise, kind, element, x, x_row_bytes, 0, tokens, columns, activations)
    launch(launcher, state, tasks[0], quantise, chunks)
    launch(launcher, state, tasks[1], job, split_tiles(job, 1, blocks * tile_bytes_of_block, 1, threads, True))


def linear_words(tokens: int, rows: int, activations_nbytes: int, own_sums: bool) -> int:
    """Words of 8 bytes that `run_linear` needs; activations_nbytes of all tokens."""
    tables = quantisation.JOB_FIELDS + kernel.JOB_FIELDS + 3 + 3 * tokens
    sums = (tokens * rows + 1) // 2 if own_sums else 0
    return -(-tables // 8) * 8 + -(-activations_nbytes // 8) + sums


# Fields of a shape: what the jobs need of a packed BundleLayout.
(
    HIDDEN,
    INTERMEDIATE,
    MATRICES,
    UP_CODES,
    UP_CODES_STRIDE,
    UP_SCALES,
    UP_SCALES_STRIDE,
    UP_BIAS,  # 0: no biases
    DOWN_CODES,
    DOWN_SCALES,
    DOWN_BIAS,
    KIND,  # of activation blocks
    CODES_NBYTES,  # of a block
    SHAPE_FIELDS,
) = range(14)

# Where the tables of an expert call lie in the workspace, in words of 8 bytes.
_QUANTISE_JOB = 0
_UP_JOB = _QUANTISE_JOB + quantisation.JOB_FIELDS
_DOWN_JOB = _UP_JOB + kernel.JOB_FIELDS
PHASES = _DOWN_JOB + kernel.JOB_FIELDS
_TABLES = PHASES + 9


@inner
def _table_words(experts, pairs):
    return (_TABLES + 3 * experts + 4 * pairs + 7) // 8 * 8


def expert_words(experts: int, pairs: int, activations_nbytes: int, sums_nbytes: int, hidden_nbytes: int) -> int:
    """Words of 8 bytes that `prepare_experts` needs; the bytes of all rows of each kind, once they are quantised."""
    nbytes = activations_nbytes + sums_nbytes + hidden_nbytes
    return (_TABLES + 3 * experts + 4 * pairs + 7) // 8 * 8 + -(-nbytes // 8) + 2


@inner
def _fill_matrix_job(job, experts, rows, columns, matrices, inputs, sums, outputs, output):
    job[kernel.EXPERTS] = experts
    job[kernel.ROWS] = rows
    job[kernel.BLOCKS] = blocks_of(columns)
    job[kernel.MATRICES] = matrices
    job[kernel.INPUT_ROWS] = inputs
    job[kernel.SUM_ROWS] = sums
    job[kernel.OUTPUT_ROWS] = outputs
    job[kernel.OUTPUT] = output


@inner
def _fill_phase(workspace, phase, task, job, chunks):
    workspace[PHASES + 3 * phase] = task
    workspace[PHASES + 3 * phase + 1] = workspace.ctypes.data + 8 * job
    workspace[PHASES + 3 * phase + 2] = chunks


@entry()
def prepare_experts(
    workspace,
    shape,
    tasks,
    element,
    bundles,
    offsets,
    tokens,
    x_address,
    x_row_bytes,
    x_rows,
    rows,
    out_address,
    out_row_bytes,
    out_rows,
    up,
    down,
    activation,
    threads,
):
    """Fill the workspace for the projections asked for; returns what was wrong (expert_mlp_jobs.FINE if nothing).

    The phases are quantisation of x, then each projection. Arguments as for `expert_mlp_jobs.prepare`, but
    workspace: `expert_words`; shape: int64 [SHAPE_FIELDS] of this module; tasks: addresses of quantisation and of the
    format's task; element: number of x's type.
    """
    pairs, experts = len(tokens), len(bundles)
    base = workspace.ctypes.data
    active = fill_experts(workspace[_TABLES : _TABLES + 3 * experts], bundles, offsets, pairs)
    if active < 0:
        return BAD_OFFSETS
    even = are_even(offsets)
    matrices = shape[MATRICES]
    x_columns = shape[HIDDEN] if up else shape[INTERMEDIATE]
    row_nbytes = blocks_of(x_columns) * block_nbytes(shape[KIND])
    hidden_nbytes = blocks_of(shape[INTERMEDIATE]) * block_nbytes(shape[KIND])
    sums_nbytes = 4 * shape[INTERMEDIATE] * (matrices + 1)
    activations = base + 8 * _table_words(experts, pairs)
    # Rows are quantised once, or once for each pair where there are fewer pairs than rows.
    by_pair = pairs < x_rows
    quantised = pairs if by_pair else x_rows
    hidden = activations + quantised * row_nbytes
    sums = hidden + pairs * hidden_nbytes
    table = _TABLES + 3 * experts
    if not fill_rows(workspace[table : table + pairs], activations, row_nbytes, tokens, x_rows):
        return BAD_TOKEN
    if by_pair:
        fill_consecutive(workspace[table : table + pairs], activations, row_nbytes)
    if not fill_rows(workspace[table + pairs : table + 2 * pairs], out_address, out_row_bytes, rows, out_rows):
        return BAD_ROW
    inputs = base + 8 * table
    outputs, between, sum_rows = inputs + 8 * pairs, inputs + 16 * pairs, inputs + 24 * pairs
    quantise = workspace[_QUANTISE_JOB : _QUANTISE_JOB + quantisation.JOB_FIELDS]
    chunks = fill_quantisation(
        quantise, shape[KIND], element, x_address, x_row_bytes, tokens.ctypes.data if by_pair else 0, quantised,
        x_columns, activations,
    )  # fmt: skip
    _fill_phase(workspace, 0, tasks[0], _QUANTISE_JOB, chunks)
    phase = 1
    if up:
        job = workspace[_UP_JOB : _UP_JOB + kernel.JOB_FIELDS]
        _fill_matrix_job(
            job, base + 8 * _TABLES, shape[INTERMEDIATE], shape[HIDDEN], matrices, inputs, outputs, outputs, kernel.SUMS
        )
        job[kernel.CODES], job[kernel.CODES_STRIDE] = shape[UP_CODES], shape[UP_CODES_STRIDE]
        job[kernel.SCALES], job[kernel.SCALES_STRIDE] = shape[UP_SCALES], shape[UP_SCALES_STRIDE]
        job[kernel.BIAS], job[kernel.BIAS_STRIDE] = shape[UP_BIAS], 4 * shape[INTERMEDIATE]
        if down:
            job[kernel.OUTPUT] = kernel.HIDDEN
            job[kernel.ACTIVATION] = activation
            job[kernel.SUM_ROWS], job[kernel.OUTPUT_ROWS] = sum_rows, between
            fill_consecutive(workspace[table + 2 * pairs : table + 3 * pairs], hidden, hidden_nbytes)
            fill_consecutive(workspace[table + 3 * pairs : table + 4 * pairs], sums, sums_nbytes)
        tile_nbytes = matrices * blocks_of(shape[HIDDEN]) * shape[CODES_NBYTES]
        chunks = split_tiles(job, active, tile_nbytes, kernel.TILES_PER_BLOCK, threads, even)
        _fill_phase(workspace, phase, tasks[1], _UP_JOB, chunks)
        phase += 1
    if down:
        job = workspace[_DOWN_JOB : _DOWN_JOB + kernel.JOB_FIELDS]
        down_inputs = between if up else inputs
        _fill_matrix_job(
            job, base + 8 * _TABLES, shape[HIDDEN], shape[INTERMEDIATE], 1, down_inputs, outputs, outputs, kernel.SUMS
        )
        job[kernel.CODES], job[kernel.SCALES], job[kernel.BIAS] = (
            shape[DOWN_CODES],
            shape[DOWN_SCALES],
            shape[DOWN_BIAS],
        )
        tile_nbytes = blocks_of(shape[INTERMEDIATE]) * shape[CODES_NBYTES]
        chunks = split_tiles(job, active, tile_nbytes, 1, threads, even)
        _fill_phase(workspace, phase, tasks[1], _DOWN_JOB, chunks)
    return FINE
