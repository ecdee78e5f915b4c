# mypy: allow-untyped-defs
"""Tables and jobs of packed kernels, filled and, for a linear layer, started by compiled code."""

from __future__ import annotations

from cpu_kernels import activation_quantisation_kernel as quantisation
from cpu_kernels import packed_kernel as kernel
from cpu_kernels.activation_quantisation_kernel import block_nbytes
from cpu_kernels.jit import entry, inner
from cpu_kernels.launch import launch
from formats.packed import COLUMN_BLOCK, TILE_ROWS

# A chunk should be long against the claim of it (0.1 us) and short against a phase.
_CHUNK_BYTES = 256 << 10
_CHUNKS_PER_THREAD = 8
# Below this, starting a region of threads takes longer than what a second thread saves.
_ONE_THREAD_BYTES = 64 << 10
_QUANTISED_AT_ONCE = 8


@inner
def blocks_of(columns):
    """Blocks of 64 columns."""
    return (columns + COLUMN_BLOCK - 1) // COLUMN_BLOCK


@inner
def fill_quantisation(job, kind, element, x, x_row_bytes, tokens, columns, blocks):
    """Enter a job of quantisation; returns its chunks."""
    job[quantisation.KIND] = kind
    job[quantisation.ELEMENT] = element
    job[quantisation.X] = x
    job[quantisation.X_ROW_BYTES] = x_row_bytes
    job[quantisation.TOKENS] = tokens
    job[quantisation.COLUMNS] = columns
    job[quantisation.BLOCKS] = blocks
    job[quantisation.TOKENS_PER_CHUNK] = _QUANTISED_AT_ONCE
    return (tokens + _QUANTISED_AT_ONCE - 1) // _QUANTISED_AT_ONCE


@inner
def split_tiles(job, active, tile_nbytes, granularity, threads):
    """Enter how row tiles are split, in multiples of `granularity`; returns the number of chunks.

    tile_nbytes: bytes of codes of one row tile, of both matrices where there are two.
    """
    tiles = (job[kernel.ROWS] + TILE_ROWS - 1) // TILE_ROWS
    total = active * tiles * tile_nbytes
    nbytes = min(_CHUNK_BYTES, total // (threads * _CHUNKS_PER_THREAD)) if total > _ONE_THREAD_BYTES else total
    per_chunk = max(1, nbytes // tile_nbytes // granularity) * granularity
    job[kernel.TILES_PER_CHUNK] = per_chunk
    job[kernel.CHUNKS_PER_EXPERT] = (tiles + per_chunk - 1) // per_chunk
    return active * job[kernel.CHUNKS_PER_EXPERT]


@entry()
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
    """out [tokens, rows] = x [tokens, columns] times packed weights, plus bias.

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
    chunks = fill_quantisation(quantise, kind, element, x, x_row_bytes, tokens, columns, activations)
    launch(launcher, state, tasks[0], quantise, chunks)
    launch(launcher, state, tasks[1], job, split_tiles(job, 1, blocks * tile_bytes_of_block, 1, threads))


def linear_words(tokens: int, rows: int, activations_nbytes: int, own_sums: bool) -> int:
    """Words of 8 bytes that `run_linear` needs; activations_nbytes of all tokens."""
    tables = quantisation.JOB_FIELDS + kernel.JOB_FIELDS + 3 + 3 * tokens
    sums = (tokens * rows + 1) // 2 if own_sums else 0
    return -(-tables // 8) * 8 + -(-activations_nbytes // 8) + sums
