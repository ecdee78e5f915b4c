# mypy: allow-untyped-defs
"""Tables and jobs of panel kernels, filled by compiled code."""

from __future__ import annotations

from cpu_kernels import expert_mlp_jobs as layouts
from cpu_kernels import panel_kernel as kernel
from cpu_kernels.expert_mlp_jobs import BAD_ROW, BAD_TOKEN, FINE, fill_rows
from cpu_kernels.jit import entry, inner
from cpu_kernels.panel_simd import MOST_ROWS, PANEL_COLUMN_BYTES

# Where the tables lie in the workspace, in words of 8 bytes.
_PACK_JOB = 0
_UP_JOB = _PACK_JOB + kernel.PACK_FIELDS
_DOWN_JOB = _UP_JOB + kernel.JOB_FIELDS
PHASES = _DOWN_JOB + kernel.JOB_FIELDS
_TABLES = PHASES + 9

_ROWS_STEP = 24
"""Rows of a chunk are a multiple of it, as it is of every tile's rows."""

_CHUNKS_PER_THREAD = 8


@inner
def most_panels(experts, pairs):
    """Bound on the panels of so many pairs."""
    return experts + pairs // kernel.PANEL_TOKENS


@inner
def _panels_at(experts, pairs):
    return (_TABLES + 4 * experts + 2 * most_panels(experts, pairs) + 2 * pairs + 7) // 8 * 8


def panel_words(experts: int, pairs: int, columns: int) -> int:
    """Words of 8 bytes that `prepare` needs; columns: of all panels of one expert, as `prepare` has them."""
    panels = experts + pairs // kernel.PANEL_TOKENS
    tables = _TABLES + 4 * experts + 2 * panels + 2 * pairs
    return -(-tables // 8) * 8 + panels * columns * PANEL_COLUMN_BYTES // 8


@inner
def _fill_experts(experts, panels, bundles, offsets):
    """Enter experts that have pairs, and their panels; returns how many there are of both."""
    active, count = 0, 0
    for expert in range(len(bundles)):
        first, end = offsets[expert], offsets[expert + 1]
        if first == end:
            continue
        experts[4 * active], experts[4 * active + 1] = bundles[expert], first
        experts[4 * active + 2], experts[4 * active + 3] = end - first, count
        active += 1
        for pair in range(first, end, kernel.PANEL_TOKENS):
            panels[2 * count], panels[2 * count + 1] = pair, min(kernel.PANEL_TOKENS, end - pair)
            count += 1
    return active, count


@inner
def _fill_job(job, experts, active, rows, columns, matrices, inputs, input_rows, sums, sum_rows, threads):
    per_chunk = active * rows // (threads * _CHUNKS_PER_THREAD) // _ROWS_STEP * _ROWS_STEP
    per_chunk = max(_ROWS_STEP, min(MOST_ROWS, per_chunk))
    job[kernel.EXPERTS] = experts
    job[kernel.CHUNKS_PER_EXPERT] = (rows + per_chunk - 1) // per_chunk
    job[kernel.ROWS_PER_CHUNK] = per_chunk
    job[kernel.ROWS] = rows
    job[kernel.COLUMNS] = columns
    job[kernel.MATRICES] = matrices
    job[kernel.INPUT_PANELS], job[kernel.INPUT_STRIDE] = inputs, input_rows * PANEL_COLUMN_BYTES
    job[kernel.SUM_PANELS], job[kernel.SUM_STRIDE] = sums, sum_rows * PANEL_COLUMN_BYTES
    return active * job[kernel.CHUNKS_PER_EXPERT]


@inner
def _fill_phase(workspace, phase, task, job, chunks):
    workspace[PHASES + 3 * phase] = task
    workspace[PHASES + 3 * phase + 1] = workspace.ctypes.data + 8 * job
    workspace[PHASES + 3 * phase + 2] = chunks


@entry()
def prepare(
    workspace,
    shape,
    tasks,
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
    rounded,
    threads,
):
    """Fill the workspace for the projections asked for; returns what was wrong (expert_mlp_jobs.FINE if nothing).

    The phases are packing, then each projection. Arguments as for `expert_mlp_jobs.prepare`, but workspace:
    `panel_words`, of panels with columns for x and for all sums (H and 2 I or 3 I for a whole expert, else H and I or
    2 I); tasks: addresses of packing and of multiplying; offsets have been checked; rounded: whether outputs are
    elements.
    """
    pairs, experts = len(tokens), len(bundles)
    base = workspace.ctypes.data
    panel_table = _TABLES + 4 * experts
    input_table = panel_table + 2 * most_panels(experts, pairs)
    output_table = input_table + pairs
    active, panels = _fill_experts(workspace[_TABLES:panel_table], workspace[panel_table:input_table], bundles, offsets)
    if not fill_rows(workspace[input_table:output_table], x_address, x_row_bytes, tokens, x_rows):
        return BAD_TOKEN
    if not fill_rows(workspace[output_table : output_table + pairs], out_address, out_row_bytes, rows, out_rows):
        return BAD_ROW
    hidden, intermediate, matrices = shape[layouts.HIDDEN], shape[layouts.INTERMEDIATE], 1 + shape[layouts.GATED]
    columns = hidden if up else intermediate
    inputs = base + 8 * _panels_at(experts, pairs)
    sums = inputs + panels * columns * PANEL_COLUMN_BYTES
    pack = workspace[_PACK_JOB : _PACK_JOB + kernel.PACK_FIELDS]
    pack[kernel.PANELS], pack[kernel.X_ROWS] = base + 8 * panel_table, base + 8 * input_table
    pack[kernel.X_COLUMNS], pack[kernel.X_PANELS] = columns, inputs
    _fill_phase(workspace, 0, tasks[0], _PACK_JOB, panels)
    phase = 1
    if up:
        job = workspace[_UP_JOB : _UP_JOB + kernel.JOB_FIELDS]
        sum_rows = intermediate * (matrices + 1 if down else matrices)
        chunks = _fill_job(
            job, base + 8 * _TABLES, active, intermediate, hidden, matrices, inputs, hidden, sums, sum_rows, threads
        )
        job[kernel.WEIGHTS_OFFSET], job[kernel.BIAS_OFFSET] = shape[layouts.UP_OFFSET], shape[layouts.UP_BIAS_OFFSET]
        job[kernel.OUTPUT_ROWS] = 0 if down else base + 8 * output_table
        job[kernel.OUTPUT_ROUNDED], job[kernel.ACTIVATION] = rounded, activation
        _fill_phase(workspace, phase, tasks[1], _UP_JOB, chunks)
        phase += 1
    if down:
        job = workspace[_DOWN_JOB : _DOWN_JOB + kernel.JOB_FIELDS]
        # The activation lies behind the sums of the up projection; x is not needed any more.
        source = sums + matrices * intermediate * PANEL_COLUMN_BYTES if up else inputs
        source_rows = (matrices + 1) * intermediate if up else intermediate
        target = inputs if up else sums
        chunks = _fill_job(
            job, base + 8 * _TABLES, active, hidden, intermediate, 1, source, source_rows, target, hidden, threads
        )
        job[kernel.WEIGHTS_OFFSET], job[kernel.BIAS_OFFSET] = (
            shape[layouts.DOWN_OFFSET],
            shape[layouts.DOWN_BIAS_OFFSET],
        )
        job[kernel.OUTPUT_ROWS], job[kernel.OUTPUT_ROUNDED] = base + 8 * output_table, rounded
        _fill_phase(workspace, phase, tasks[1], _DOWN_JOB, chunks)
    return FINE
