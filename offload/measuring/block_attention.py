"""Calls of decode attention to KV caches in blocks that are not in the CPU's caches."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.prepared_attention import PreparedAttention, one_list, rows_elements
from formats.kv import KvLayout
from formats.kv_pack import pack_kv_block
from offload.devices.host_threads import kernel_pool
from offload.measuring.kernels import COLD_NBYTES, HEAD_WIDTH, HEADS, KV_HEADS, NARROW_HEAD_WIDTH
from placement.kv import SETTINGS
from profiler.subjects import Attention

_PAGE_NBYTES = 4096
_IN_A_ROW = 4
"""Calls of a run."""


def block_attention_calls(format: str, cached_tokens: int, *, narrow: bool = False) -> Attention:
    """Attention of one layer with grouped heads, as decode calls it from one token to the next.

    Args:
        format: of the blocks.
        cached_tokens: of a history; blocks are full.
        narrow: heads have few products for each score.
    """
    width = NARROW_HEAD_WIDTH if narrow else HEAD_WIDTH
    layout = KvLayout(format, KV_HEADS, width, width, SETTINGS.block_tokens)
    blocks = max(1, cached_tokens // layout.block_tokens)
    tokens = blocks * layout.block_tokens
    histories = max(2, COLD_NBYTES // 2 // (blocks * layout.nbytes))
    memory = np.empty(histories * blocks * layout.nbytes + _PAGE_NBYTES, np.uint8)
    addresses = _fill(layout, memory, histories * blocks)
    out, lse = torch.empty(1, HEADS, 1, layout.output_width), torch.empty(1, HEADS, 1)
    queries = torch.empty(rows_elements(layout, 1, HEADS))
    prepared = itertools.cycle(
        [
            PreparedAttention(
                one_list(layout, addresses[first : first + blocks]), width**-0.5, queries, out, lse
            )
            for first in range(0, len(addresses), blocks)
        ]
    )  # fmt: skip
    query, pool = torch.randn(1, HEADS, 1, width), kernel_pool()

    def run(_memory: npt.NDArray[np.uint8] = memory) -> None:
        for _ in range(_IN_A_ROW):
            next(prepared).attend(query, tokens, tokens - 1, pool)

    scores = float(HEADS * tokens)
    return Attention(blocks * layout.nbytes, 4.0 * width * scores, run, _IN_A_ROW, scores)


def _fill(layout: KvLayout, memory: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int64]:
    """Addresses of blocks in that memory, all with one block's content."""
    start = -memory.ctypes.data % _PAGE_NBYTES
    generator = np.random.default_rng(0)
    shape = layout.kv_heads, layout.block_tokens
    keys, values = (
        generator.standard_normal((*shape, width)).astype(np.float32)
        for width in (layout.key_width, layout.value_width)
    )
    lying = memory[start : start + count * layout.nbytes].reshape(count, layout.nbytes)
    lying[:] = pack_kv_block(keys, values, layout)
    addresses: npt.NDArray[np.int64] = lying.ctypes.data + np.arange(count, dtype=np.int64) * layout.nbytes
    return addresses
