"""Blocks of a KV cache with random contents, in memory that is poison around what they hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from formats.kv import KvLayout
from formats.kv_pack import pack_kv_block

_POISON = 0xFF  # NaN in every float format, the largest of other codes


@dataclass(frozen=True)
class Blocks:
    """Lists of blocks, one for each sequence.

    Attributes:
        memory: where they lie.
        offsets: int64 [B + 1], where each sequence's addresses start.
        addresses: int64, of blocks.
        lengths: int64 [B], tokens of each sequence.
        layout: of the blocks.
    """

    memory: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    addresses: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    layout: KvLayout


def empty_blocks(layout: KvLayout, lengths: list[int], seed: int = 0) -> Blocks:
    """Room for sequences of these lengths: poison, blocks in random order."""
    counts = [-(-length // layout.block_tokens) for length in lengths]
    total = sum(counts)
    raw = np.full((total + 3) * layout.nbytes, _POISON, np.uint8)
    start = -raw.ctypes.data % 64 + 64
    order = np.random.default_rng(seed).permutation(total + 1)[:total]
    addresses = (raw.ctypes.data + start + order * layout.nbytes).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Blocks(raw, offsets, addresses, np.array(lengths, np.int64), layout)


def fill(blocks: Blocks, keys: npt.NDArray[np.float32], values: npt.NDArray[np.float32] | None) -> None:
    """Write keys [B, Hk, S, D] and values; what a plain block has after its last token stays poison."""
    layout = blocks.layout
    for sequence, length in enumerate(blocks.lengths):
        for number in range(blocks.offsets[sequence + 1] - blocks.offsets[sequence]):
            span = slice(number * layout.block_tokens, min(int(length), (number + 1) * layout.block_tokens))
            value = None if values is None else values[sequence, :, span]
            content = pack_kv_block(keys[sequence, :, span], value, layout)
            start = int(blocks.addresses[blocks.offsets[sequence] + number]) - blocks.memory.ctypes.data
            if not layout.is_quantised:
                _poison_after(content, span.stop - span.start, layout)
            blocks.memory[start : start + layout.nbytes] = content


def _poison_after(content: npt.NDArray[np.uint8], tokens: int, layout: KvLayout) -> None:
    for head in range(layout.kv_heads):
        for name, part in layout.parts.items():
            start = head * layout.head_nbytes + part.offset
            lying = content[start : start + part.nbytes].reshape(*part.shape, -1)
            if name == "keys" and not layout.value_from_key:
                by_token = lying.transpose(0, 2, 1, 3)
                for panel in range(part.shape[0]):
                    by_token[panel, max(0, tokens - panel * layout.lanes) :] = _POISON
            else:
                lying[:, tokens:] = _POISON


def random_blocks(layout: KvLayout, lengths: list[int], seed: int = 0) -> Blocks:
    """Blocks filled with normal numbers."""
    generator = np.random.default_rng(seed + 1)
    shape = (len(lengths), layout.kv_heads, max(max(lengths), 1))
    keys = generator.standard_normal((*shape, layout.key_width)).astype(np.float32)
    values = None
    if not layout.value_from_key:
        values = generator.standard_normal((*shape, layout.value_width)).astype(np.float32)
    blocks = empty_blocks(layout, lengths, seed)
    fill(blocks, keys, values)
    return blocks
