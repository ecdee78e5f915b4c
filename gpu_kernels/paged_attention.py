"""Attention of a few new tokens to lists of KV blocks in the GPU's memory, to be merged with parts of other devices."""

from __future__ import annotations

from functools import cache

import torch

from formats.elements import ELEMENT_FORMATS
from formats.kv import INT4_GROUP, KvLayout
from gpu_kernels.attention import merge_attention
from gpu_kernels.launch import DTYPE_OF_FORMAT, Threads, dot_type, element_type, launch, processors
from gpu_kernels.paged_attention_kernel import paged_attention_kernel

_FEW_ROWS = 16
_MANY_ROWS = 32
_MOST_PARTS = 64
_SMALLEST_PART_TILES = 4
_TILE_NBYTES = 32 << 10
"""Keys and values of a tile as operands: two of them are under way, beside queries, in the 99 KiB of consumer cards."""
_UNPACKED_TILE_NBYTES = 20 << 10
"""The same of codes, which become operands in registers, and of fp32, which no tensor cores take."""
_PARTS = ("keys", "key_scales", "key_zeros", "values", "value_scales", "value_zeros")


def paged_attention(
    query: torch.Tensor,
    offsets: torch.Tensor,
    addresses: torch.Tensor,
    lengths: torch.Tensor,
    first_positions: torch.Tensor,
    query_positions: torch.Tensor,
    layout: KvLayout,
    scale: float,
    *,
    most_tokens: int,
    window: int | None = None,
    softcap: float | None = None,
    valid: torch.Tensor | None = None,
    parts: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax(scale q K^T) V over lists of blocks; query heads g G to g G + G - 1 share key-value head g.

    As `cpu_kernels.paged_attention`, with everything on the GPU; nothing waits for it. A query at position P sees the
    tokens at positions P - window + 1 to P. Scores, exponentials and sums are fp32; products take operands of the
    queries' dtype where it holds the blocks' numbers (codes are exact in each, int4's numbers and weights are rounded
    to it), else fp32. Equal inputs give equal bits, which depend on `most_tokens` and the number of lists as well.

    Args:
        query: [n, Hq, T, D], channels contiguous: bf16, fp16 or fp32; D = layout.key_width.
        offsets: int64 [n + 1]; list i is addresses[offsets[i] : offsets[i + 1]].
        addresses: int64, of blocks in the GPU's memory, in the order of their tokens.
        lengths: int64 [n], tokens of each list; all but the last block are full. What follows them may be anything.
        first_positions: int64 [n], the position of each list's first token.
        query_positions: int64 [n, T].
        layout: of the blocks.
        scale: of the scores.
        most_tokens: of a list, known to the host: at least the largest of `lengths`.
        window: how many tokens a query sees, itself included; None: all.
        softcap: c of c tanh(score / c); None: none.
        valid: bool [n, S], False for positions that no query sees (left padding); S above every position.
        parts: to cut each list into; None for as many as fill the device.

    Returns:
        out fp32 [n, Hq, T, V] and lse fp32 [n, Hq, T], the logarithm of the sum of exponentials of scores. Of a query
        that sees nothing: zeros and minus infinity.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.
    """
    lists, heads, new = _check(query, offsets, addresses, lengths, first_positions, query_positions, layout, valid)
    if (window is not None and window < 1) or (softcap is not None and not softcap > 0) or most_tokens < 0:
        raise ValueError(f"window={window}, softcap={softcap}, most_tokens={most_tokens}: expected positive numbers")
    group = heads // layout.kv_heads
    dtype = _operands(query.dtype, layout.format)
    constants, tokens, is_wide = _tiles(layout, dtype.itemsize)
    # Sums of many rows of wide values, or of fp32, would not stay in registers.
    rows = _FEW_ROWS if is_wide or dtype.itemsize == 4 or group * new <= _FEW_ROWS else _MANY_ROWS
    row_blocks = -(-group * new // rows)
    if parts is None:
        parts = _parts(lists * layout.kv_heads * row_blocks, -(-most_tokens // tokens), processors(query.device))
    out = torch.empty(parts, lists, heads, new, layout.output_width, dtype=torch.float32, device=query.device)
    lse = torch.empty(parts, lists, heads, new, dtype=torch.float32, device=query.device)
    launch(
        paged_attention_kernel,
        (lists, layout.kv_heads, row_blocks * parts),
        (
            query, offsets, addresses, lengths, first_positions, query_positions,
            lengths if valid is None else valid.view(torch.uint8), out, lse, parts, new, group,
            0 if valid is None else valid.shape[1], window or 0, float(scale), float(softcap or 1.0),
            *query.stride()[:3],
        ),
        _threads(layout, dtype.itemsize, is_wide=is_wide, many_rows=rows == _MANY_ROWS),
        query.device,
        FORMAT=layout.format,
        ELEMENT=element_type(dtype),
        DOT=dot_type(dtype),
        SOFTCAP=softcap is not None,
        PADDED=valid is not None,
        ROWS=rows,
        **constants,
    )  # fmt: skip
    return (out[0], lse[0]) if parts == 1 else merge_attention(out, lse)


def _operands(dtype: torch.dtype, format: str) -> torch.dtype:
    """The dtype of products' operands: the queries', if the blocks' numbers are exact in it."""
    return dtype if format not in ELEMENT_FORMATS or DTYPE_OF_FORMAT[format] is dtype else torch.float32


@cache
def _tiles(layout: KvLayout, itemsize: int) -> tuple[dict[str, int | bool], int, bool]:
    """The kernel's constants for blocks of a layout, the tokens of a tile, and whether tiles are wide."""
    latent = bool(layout.value_from_key)
    # Of int4's keys with lanes of tokens a group is taken whole; of lanes of channels a group is channels.
    shortest, smallest = INT4_GROUP if layout.is_int4 and not latent else 16, INT4_GROUP if layout.is_int4 else 16
    depth = _power_of_two(layout.key_width - layout.value_from_key, smallest)
    columns = _power_of_two(layout.output_width, smallest)
    most = _UNPACKED_TILE_NBYTES if layout.is_quantised or itemsize == 4 else _TILE_NBYTES
    # The largest power of two that divides a block.
    tokens = min(64, layout.block_tokens & -layout.block_tokens)
    while tokens > shortest and (depth + columns) * tokens * itemsize > most:
        tokens //= 2
    starts = {name.upper(): layout.parts[name].offset if name in layout.parts else 0 for name in _PARTS}
    constants = {
        **starts,
        "HEAD_NBYTES": layout.head_nbytes,
        "BLOCK": layout.block_tokens,
        "PANEL_ROWS": layout.key_rows,
        "WIDTH": layout.key_width,
        "VALUE": layout.output_width,
        "LATENT": latent,
        "TOKENS": tokens,
        "DEPTH": depth,
        "COLUMNS": columns,
    }
    return constants, tokens, max(depth, columns) > 128


def _threads(layout: KvLayout, itemsize: int, *, is_wide: bool, many_rows: bool) -> Threads:
    """What compiles without spilling; what is fastest on which card no GPU has told yet."""
    if is_wide or itemsize == 4:
        return Threads(warps=8 if layout.is_quantised or itemsize == 4 else 4)
    return Threads(warps=8 if many_rows else 4, stages=2)


def _parts(programs: int, tiles: int, processors: int) -> int:
    """A power of two, so that sums seldom come in other parts while contexts grow."""
    wanted = min(2 * processors // max(programs, 1), tiles // _SMALLEST_PART_TILES, _MOST_PARTS)
    return 1 << max(0, wanted.bit_length() - 1)


def _power_of_two(size: int, smallest: int) -> int:
    return max(smallest, 1 << max(0, size - 1).bit_length())


def _check(
    query: torch.Tensor,
    offsets: torch.Tensor,
    addresses: torch.Tensor,
    lengths: torch.Tensor,
    first_positions: torch.Tensor,
    query_positions: torch.Tensor,
    layout: KvLayout,
    valid: torch.Tensor | None,
) -> tuple[int, int, int]:
    if query.dim() != 4 or query.shape[3] != layout.key_width or query.shape[1] % layout.kv_heads or 0 in query.shape:
        raise ValueError(
            f"query: expected [n, Hq, T, {layout.key_width}], Hq a multiple of {layout.kv_heads}, found "
            f"{tuple(query.shape)}"
        )
    if query.dtype not in DTYPE_OF_FORMAT.values() or (query.shape[3] > 1 and query.stride(3) != 1):
        raise ValueError(f"query: expected bf16, fp16 or fp32 with contiguous channels, found {query.dtype}")
    lists, heads, new, _ = query.shape
    for name, tensor, shape in (
        ("offsets", offsets, (lists + 1,)),
        ("addresses", addresses, (addresses.numel(),)),
        ("lengths", lengths, (lists,)),
        ("first_positions", first_positions, (lists,)),
        ("query_positions", query_positions, (lists, new)),
    ):
        if tensor.dtype != torch.int64 or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous int64 {list(shape)}, found {tensor.dtype} {tuple(tensor.shape)}"
            )
    if valid is not None and (
        valid.dtype != torch.bool or valid.dim() != 2 or len(valid) != lists or not valid.is_contiguous()
    ):
        raise ValueError(f"valid: expected contiguous bool [{lists}, S], found {valid.dtype} {tuple(valid.shape)}")
    tensors = (offsets, addresses, lengths, first_positions, query_positions, valid)
    if any(tensor is not None and tensor.device != query.device for tensor in tensors):
        raise ValueError(f"lists of blocks must be described on {query.device}, where the query is")
    return lists, heads, new
