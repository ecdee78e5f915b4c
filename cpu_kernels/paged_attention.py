"""Attention over the blocks of a paged KV cache where they lie, with log-sum-exp so that parts can be merged."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import paged_attention_block as block_fields
from cpu_kernels import paged_attention_kernel as kernel
from cpu_kernels.kv_simd import FP8_FACTOR, KvCode
from cpu_kernels.paged_attention_jobs import chunk_counter, chunk_runner
from cpu_kernels.tensors import describe
from cpu_kernels.threads import Pool
from cpu_kernels.workspace import workspace
from formats.kv import KvLayout
from formats.packed import round_up

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

_NO_WINDOW = 1 << 60
_CACHE_LINE_NBYTES = 64


@cache
def layout_fields(layout: KvLayout) -> Int64:
    """A layout as jobs of kernels have it: int64 [LAYOUT_FIELDS]."""
    fields = np.zeros(block_fields.LAYOUT_FIELDS, np.int64)
    fields[block_fields.KEY_WIDTH] = layout.key_width
    fields[block_fields.KEY_ROWS] = layout.key_rows
    fields[block_fields.KEY_COLUMNS] = layout.key_columns
    fields[block_fields.VALUE_COLUMNS] = layout.value_columns
    fields[block_fields.OUTPUT_WIDTH] = layout.output_width
    fields[block_fields.FROM_KEY] = layout.value_from_key
    fields[block_fields.BLOCK_TOKENS] = layout.block_tokens
    fields[block_fields.HEAD_NBYTES] = layout.head_nbytes
    fields[block_fields.QUERY_NBYTES] = 4 * round_up(layout.key_width, 16)
    # The largest score and the sum of exponentials are the last two of 16 more.
    fields[block_fields.PART_NBYTES] = 4 * (max(layout.value_columns, round_up(layout.output_width, 16)) + 16)
    for name, part in layout.parts.items():
        fields[getattr(block_fields, name.upper())] = part.offset
    code = KvCode(layout.format)
    fields[block_fields.ROW_NBYTES] = code.row_nbytes
    fields[block_fields.HAS_SCALES] = layout.is_quantised
    fields[block_fields.HAS_TOKEN_SCALES] = code.has_token_scales
    factor = FP8_FACTOR if code.format == "fp8_e4m3" else 1.0
    fields[block_fields.CODE_FACTOR : block_fields.CODE_FACTOR + 1].view(np.float32)[0] = factor
    if code.format != "fp32":
        fields[block_fields.EXPAND_FUNCTION] = block_fields.expand_function(code)
    return fields


@cache
def _job_template(layout: KvLayout) -> Int64:
    """A job with what depends on the layout alone."""
    job = np.zeros(kernel.JOB_FIELDS, np.int64)
    job[: block_fields.LAYOUT_FIELDS] = layout_fields(layout)
    code = KvCode(layout.format)
    job[kernel.KV_HEADS] = layout.kv_heads
    job[kernel.FLOAT32_FUNCTION] = block_fields.multiply_function(KvCode("fp32"))
    if layout.value_from_key:
        job[kernel.DOT_FUNCTION] = block_fields.dot_function()
    if layout.is_int4:
        job[block_fields.INT4_SCORES_FUNCTION] = block_fields.int4_scores_function()
        job[block_fields.INT4_VALUES_FUNCTION] = block_fields.int4_values_function()
    elif layout.format == "int8" and not layout.value_from_key:
        job[block_fields.MULTIPLY_FUNCTION] = block_fields.multiply_int8_function()
        job[block_fields.ROUNDS_WEIGHTS] = 1
    elif not layout.value_from_key:
        job[block_fields.MULTIPLY_FUNCTION] = block_fields.multiply_function(code)
    return job


def paged_attention(
    query: torch.Tensor,
    offsets: Int64,
    addresses: Int64,
    lengths: Int64,
    first_positions: Int64,
    query_positions: Int64,
    layout: KvLayout,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    valid: Bool | None = None,
    rows: Int64 | None = None,
    into: tuple[torch.Tensor, torch.Tensor] | None = None,
    pool: Pool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax(scale q K^T) V over lists of blocks; query heads g G to g G + G - 1 share key-value head g.

    Scores, exponentials and sums are fp32. A query at position P sees the tokens at positions P - window + 1 to P.
    The bits do not depend on the number of threads, nor on the other sequences.

    Args:
        query: [B, Hq, T, D] on the CPU, bf16, fp16 or fp32; D = layout.key_width. With `rows` [sequences, Hq, T, D].
        offsets: int64 [B + 1]; list b's blocks are addresses[offsets[b] : offsets[b + 1]].
        addresses: int64, of blocks, in the order of their tokens.
        lengths: int64 [B], tokens of each list; all but the last block are full. What follows them may be anything.
        first_positions: int64 [B], the position of each list's first token.
        query_positions: int64 [B, T].
        layout: of the blocks.
        scale: of the scores.
        window: how many tokens a query sees, itself included; None: all.
        softcap: c of c tanh(score / c); None: none.
        valid: bool [B, S], False for positions that no query sees (left padding); S above every position. With `rows`
            [sequences, S]. Rows lie any bytes apart and are read in place.
        rows: int64 [B], the sequence whose query, and row of `valid`, each list has; None: one of its own.
        into: contiguous out and lse to write to; None for new ones.
        pool: the threads.

    Returns:
        out fp32 [B, Hq, T, V] and lse fp32 [B, Hq, T], the logarithm of the sum of exponentials of scores. Of a query
        that sees nothing: zeros and minus infinity.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.
    """
    _check_query(query, layout)
    sequences, heads, positions, _ = query.shape
    batch = sequences if rows is None else len(rows)
    check_lists(batch, positions, offsets, addresses, lengths, first_positions, query_positions, layout)
    check_rows(rows, batch, sequences)
    check_valid(valid, sequences, int((first_positions + lengths).max(initial=0)))
    if (window is not None and window < 1) or (softcap is not None and not softcap > 0):
        raise ValueError(f"window={window}, softcap={softcap}: expected positive numbers or None")
    group = heads // layout.kv_heads
    out, lse = _results(into, (batch, heads, positions), layout)
    job = attention_job(layout, group, scale, softcap)
    job[kernel.ADDRESSES], job[kernel.LENGTHS] = addresses.ctypes.data, lengths.ctypes.data
    job[kernel.FIRST_POSITIONS] = first_positions.ctypes.data
    job[kernel.QUERY_POSITIONS], job[kernel.POSITIONS] = query_positions.ctypes.data, positions
    if window is not None:
        job[kernel.WINDOW] = window
    if valid is not None:
        job[kernel.VALID], job[kernel.VALID_STRIDE] = valid.ctypes.data, valid.strides[0]
    if rows is not None:
        job[kernel.LIST_ROWS] = rows.ctypes.data
    job[kernel.OUT], job[kernel.LSE] = out.data_ptr(), lse.data_ptr()
    job[kernel.THREADS] = pool.threads
    lists = job, offsets, lengths, first_positions, query_positions
    counts = chunk_counter()(*lists)
    tasks = kernel.attention_task(), kernel.combine_task()
    scratch_nbytes = round_up(int(counts[3]), _CACHE_LINE_NBYTES)
    columns = round_up(layout.key_width, 16)
    memory = workspace(scratch_nbytes + 4 * columns * (sequences * heads * positions + 1))
    queries = torch.from_numpy(memory)[scratch_nbytes // 8 :].view(torch.float32)
    _fill_query_rows(query, layout, group, queries)
    job[kernel.QUERIES] = queries.data_ptr()
    chunk_runner()(*pool.launcher, *tasks, counts, memory, *lists)
    return out, lse


def _results(
    into: tuple[torch.Tensor, torch.Tensor] | None, shape: tuple[int, int, int], layout: KvLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    whole = *shape, layout.output_width
    if into is None:
        return torch.empty(whole, dtype=torch.float32), torch.empty(shape, dtype=torch.float32)
    for name, tensor, expected in (("out", into[0], whole), ("lse", into[1], shape)):
        fits = tensor.shape == expected and tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()
        if not fits:
            raise ValueError(f"{name}: expected contiguous fp32 {list(expected)} on the CPU, found {describe(tensor)}")
    return into


def attention_job(layout: KvLayout, group: int, scale: float, softcap: float | None = None) -> Int64:
    """A job without window but for its addresses, all of which are 0.

    Args:
        layout: of the blocks.
        group: query heads of a key-value head.
        scale: of the scores.
        softcap: see `paged_attention`.
    """
    job = _job_template(layout).copy()
    job[block_fields.GROUP] = group
    job[kernel.WINDOW] = _NO_WINDOW
    job[kernel.SCALE : kernel.SCALE + 1].view(np.float32)[0] = scale
    job[kernel.SOFTCAP : kernel.SOFTCAP + 1].view(np.float32)[0] = softcap or 0.0
    return job


def _check_query(query: torch.Tensor, layout: KvLayout) -> None:
    if (
        query.ndim != 4
        or query.shape[3] != layout.key_width
        or query.shape[1] % layout.kv_heads
        or 0 in query.shape
        or not query.is_cpu
        or query.dtype not in (torch.float32, torch.bfloat16, torch.float16)
    ):
        raise ValueError(
            f"query: expected bf16, fp16 or fp32 [B, Hq, T, {layout.key_width}] on the CPU, Hq a multiple of "
            f"{layout.kv_heads}, found {describe(query)}"
        )


def check_lists(
    batch: int,
    positions: int,
    offsets: Int64,
    addresses: Int64,
    lengths: Int64,
    first_positions: Int64,
    query_positions: Int64,
    layout: KvLayout,
) -> None:
    """See that lists of blocks are as `paged_attention` takes them.

    Raises:
        ValueError: they are not.
    """
    for name, array, shape in (
        ("offsets", offsets, (batch + 1,)),
        ("addresses", addresses, addresses.shape[:1]),
        ("lengths", lengths, (batch,)),
        ("first_positions", first_positions, (batch,)),
        ("query_positions", query_positions, (batch, positions)),
    ):
        if array.dtype != np.int64 or array.shape != shape or not array.flags.c_contiguous:
            raise ValueError(f"{name}: expected contiguous int64 {list(shape)}, found {array.dtype} {array.shape}")
    room = np.diff(offsets) * layout.block_tokens
    if offsets[0] < 0 or offsets[-1] > len(addresses) or (room < lengths).any() or (lengths < 0).any():
        raise ValueError(
            f"lengths={lengths.tolist()}: lists of {np.diff(offsets).tolist()} blocks of {layout.block_tokens} tokens, "
            f"{len(addresses)} in all, do not hold them"
        )


def check_rows(rows: Int64 | None, batch: int, sequences: int) -> None:
    """See that `batch` lists are of sequences that there are.

    Raises:
        ValueError: they are not.
    """
    if rows is None:
        return
    fits = rows.dtype == np.int64 and rows.shape == (batch,) and rows.flags.c_contiguous
    if not fits or (batch and (rows.min() < 0 or rows.max() >= sequences)):
        raise ValueError(
            f"rows: expected contiguous int64 [{batch}] below {sequences}, found {rows.dtype} {rows.shape}"
        )


def check_valid(valid: Bool | None, sequences: int, tokens: int) -> None:
    """See that a mask tells of so many tokens of as many sequences, one byte after the other.

    Raises:
        ValueError: it does not.
    """
    if valid is None:
        return
    fits = valid.dtype == np.bool_ and valid.ndim == 2 and valid.shape[0] == sequences and valid.shape[1] >= tokens
    if not fits or (valid.shape[1] > 1 and valid.strides[1] != 1):
        raise ValueError(
            f"valid: expected bool [{sequences}, {tokens} or more] of contiguous rows, found {valid.dtype} "
            f"{valid.shape} with strides {valid.strides}"
        )


def _fill_query_rows(query: torch.Tensor, layout: KvLayout, group: int, rows: torch.Tensor) -> None:
    """Write queries as fp32 [B, Hk, T, G, width in whole panels], and after the last a row that is only read."""
    batch, heads, positions, width = query.shape
    columns = round_up(width, 16)
    used = batch * heads * positions * columns
    own = rows[:used].view(batch, layout.kv_heads, positions, group, columns)
    own[..., :width].copy_(query.view(batch, layout.kv_heads, group, positions, width).transpose(2, 3))
    if columns > width:
        own[..., width:].zero_()
    rows[used : used + columns].zero_()
