# mypy: allow-untyped-defs
"""What a call of `expert_mlp` hands to its kernels: tables of addresses and the jobs, filled by compiled code."""

from __future__ import annotations

from cpu_kernels.chunk_runs import count_runs
from cpu_kernels.jit import entry, inner
from cpu_kernels.row_blocks import GROUP_ROWS

# Fields of a job. "Rows" are tables of int64 with the address of one row for every pair.
(
    EXPERTS,  # address of a table [n, 3] of int64: address of the bundle, first pair, end of pairs
    CHUNKS,  # of all experts
    RUN_THREADS,  # threads that share `chunk_runs`; 0: chunks are taken one at a time
    CHUNKS_PER_EXPERT,
    ROWS_PER_CHUNK,
    ROWS,  # rows of one matrix: I of gate and up, H of down
    COLUMNS,
    WEIGHTS_OFFSET,  # bytes from the bundle's start; of the gate where there is one, of up where there is none
    BIAS_OFFSET,  # likewise; 0 where there is no bias
    HAS_GATE,
    INPUT_ROWS,
    OUTPUT_ROWS,
    HIDDEN_ROWS,  # where the activation goes; 0: leave the sums as they are
    ACTIVATION,
    JOB_FIELDS,
) = range(15)

# Fields of a shape: what the jobs need of a BundleLayout.
(
    HIDDEN,
    INTERMEDIATE,
    GATED,
    ELEMENT_BYTES,
    UP_OFFSET,
    UP_BIAS_OFFSET,
    DOWN_OFFSET,
    DOWN_BIAS_OFFSET,
    SHAPE_FIELDS,
) = range(9)

# Where the tables lie in the workspace, in words of 8 bytes.
UP_JOB = 0
DOWN_JOB = UP_JOB + JOB_FIELDS
PHASES = DOWN_JOB + JOB_FIELDS
TABLES = PHASES + 6

# What was wrong with a call.
FINE, BAD_OFFSETS, BAD_TOKEN, BAD_ROW = range(4)

# A chunk should be long against the claim of it (0.1 us) and short against a phase.
_CHUNK_BYTES = 512 << 10
_CHUNKS_PER_THREAD = 8
_FEW_TOKENS = 8
_SMALLEST_CHUNK_ROWS = 2 * GROUP_ROWS


def workspace_words(experts: int, pairs: int) -> int:
    """Words of 8 bytes for the jobs and tables of a call, rounded to whole cache lines."""
    return -(-(TABLES + 3 * experts + 4 * pairs) // 8) * 8


@inner
def fill_experts(table, bundles, offsets, pairs):
    """Enter (bundle, first pair, end) of each expert that has pairs in a table of 3 n words.

    Returns how many there are, or -1 if the offsets do not partition the pairs.
    """
    experts = len(bundles)
    if offsets[0] != 0 or offsets[experts] != pairs:
        return -1
    active = 0
    for expert in range(experts):
        first, end = offsets[expert], offsets[expert + 1]
        if first > end or first < 0 or end > pairs:
            return -1
        if first < end:
            table[3 * active], table[3 * active + 1], table[3 * active + 2] = bundles[expert], first, end
            active += 1
    return active


@inner
def are_even(offsets):
    """Whether all experts cost about the same: they have few tokens, so that reading weights is most of the work."""
    most = 0
    for expert in range(len(offsets) - 1):
        most = max(most, offsets[expert + 1] - offsets[expert])
    return most <= _FEW_TOKENS


@inner
def fill_rows(table, base, row_bytes, index, rows):
    """table[p] = address of row index[p]; returns whether all are rows that exist."""
    for p in range(len(index)):
        if index[p] < 0 or index[p] >= rows:
            return False
        table[p] = base + row_bytes * index[p]
    return True


@inner
def fill_consecutive(table, base, row_bytes):
    """table[p] = address of row p."""
    for p in range(len(table)):
        table[p] = base + row_bytes * p


@inner
def _fill_job(workspace, job, phase, task, active, rows, columns, matrices, element_bytes, threads, even):
    total_bytes = active * rows * columns * matrices * element_bytes
    chunk_bytes = min(_CHUNK_BYTES, total_bytes // (threads * _CHUNKS_PER_THREAD))
    per_chunk = chunk_bytes // (columns * matrices * element_bytes)
    per_chunk = max(_SMALLEST_CHUNK_ROWS, per_chunk // GROUP_ROWS * GROUP_ROWS)
    base = workspace.ctypes.data
    workspace[job + EXPERTS] = base + 8 * TABLES
    workspace[job + CHUNKS_PER_EXPERT] = (rows + per_chunk - 1) // per_chunk
    workspace[job + ROWS_PER_CHUNK] = per_chunk
    workspace[job + ROWS] = rows
    workspace[job + COLUMNS] = columns
    workspace[PHASES + 3 * phase] = task
    workspace[PHASES + 3 * phase + 1] = base + 8 * job
    chunks = active * workspace[job + CHUNKS_PER_EXPERT]
    workspace[job + CHUNKS] = chunks
    workspace[job + RUN_THREADS] = threads if even else 0
    workspace[PHASES + 3 * phase + 2] = count_runs(chunks, threads) if even else chunks


@inner
def _fill_up_job(workspace, shape, task, active, inputs, outputs, hidden, activation, threads, even):
    matrices = 1 + shape[GATED]
    rows, columns = shape[INTERMEDIATE], shape[HIDDEN]
    _fill_job(workspace, UP_JOB, 0, task, active, rows, columns, matrices, shape[ELEMENT_BYTES], threads, even)
    workspace[UP_JOB + WEIGHTS_OFFSET] = shape[UP_OFFSET]
    workspace[UP_JOB + BIAS_OFFSET] = shape[UP_BIAS_OFFSET]
    workspace[UP_JOB + HAS_GATE] = shape[GATED]
    workspace[UP_JOB + INPUT_ROWS] = inputs
    workspace[UP_JOB + OUTPUT_ROWS] = outputs
    workspace[UP_JOB + HIDDEN_ROWS] = hidden
    workspace[UP_JOB + ACTIVATION] = activation


@inner
def _fill_down_job(workspace, shape, phase, task, active, inputs, outputs, threads, even):
    rows, columns = shape[HIDDEN], shape[INTERMEDIATE]
    _fill_job(workspace, DOWN_JOB, phase, task, active, rows, columns, 1, shape[ELEMENT_BYTES], threads, even)
    workspace[DOWN_JOB + WEIGHTS_OFFSET] = shape[DOWN_OFFSET]
    workspace[DOWN_JOB + BIAS_OFFSET] = shape[DOWN_BIAS_OFFSET]
    workspace[DOWN_JOB + HAS_GATE] = 0
    workspace[DOWN_JOB + INPUT_ROWS] = inputs
    workspace[DOWN_JOB + OUTPUT_ROWS] = outputs
    workspace[DOWN_JOB + HIDDEN_ROWS] = 0


@entry()
def prepare(
    workspace,
    shape,
    task,
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
    """Fill the workspace for the projections asked for; returns what was wrong (FINE if nothing).

    With both projections, fp32 sums [P, 1 or 2 times I] and h [P, I] follow the tables in the workspace.

    workspace: int64, 64-byte aligned: `workspace_words`, and with both projections the sums and h behind them.
    shape: int64 [SHAPE_FIELDS]. task: address of the compiled task. bundles, offsets: int64 [n], [n + 1].
    tokens: int64 [P], rows of the x_rows input rows at x_address, x_row_bytes apart; rows: likewise for the output.
    up, down: which projections to run. activation: its code. threads: how many will share the work.
    """
    pairs = len(tokens)
    active = fill_experts(workspace[TABLES : TABLES + 3 * len(bundles)], bundles, offsets, pairs)
    if active < 0:
        return BAD_OFFSETS
    even = are_even(offsets)
    tables = TABLES + 3 * len(bundles)
    base = workspace.ctypes.data
    if not fill_rows(workspace[tables : tables + pairs], x_address, x_row_bytes, tokens, x_rows):
        return BAD_TOKEN
    if not fill_rows(workspace[tables + pairs : tables + 2 * pairs], out_address, out_row_bytes, rows, out_rows):
        return BAD_ROW
    inputs = base + 8 * tables
    outputs = inputs + 8 * pairs
    if up and down:
        words = (tables + 4 * pairs + 7) // 8 * 8
        sums_row_bytes = 4 * shape[INTERMEDIATE] * (1 + shape[GATED])
        sums = base + 8 * words
        hidden = sums + pairs * sums_row_bytes
        fill_consecutive(workspace[tables + 2 * pairs : tables + 3 * pairs], sums, sums_row_bytes)
        hidden_row_bytes = shape[INTERMEDIATE] * shape[ELEMENT_BYTES]
        fill_consecutive(workspace[tables + 3 * pairs : tables + 4 * pairs], hidden, hidden_row_bytes)
        between = inputs + 24 * pairs
        _fill_up_job(workspace, shape, task, active, inputs, inputs + 16 * pairs, between, activation, threads, even)
        _fill_down_job(workspace, shape, 1, task, active, between, outputs, threads, even)
    elif up:
        _fill_up_job(workspace, shape, task, active, inputs, outputs, 0, 0, threads, even)
    else:
        _fill_down_job(workspace, shape, 0, task, active, inputs, outputs, threads, even)
    return FINE
