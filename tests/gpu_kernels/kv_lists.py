"""Lists of KV blocks in a device's memory, with poison after what they hold and between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from formats.kv import KvLayout
from formats.kv_pack import pack_kv_block

_POISON = 0xFF  # NaN in every float format, the largest of other codes


@dataclass(frozen=True)
class Lists:
    """The slab that holds the blocks, the bytes of each list's blocks, and what kernels are told, on the device."""

    slab: torch.Tensor
    blocks: list[list[np.ndarray]]
    offsets: torch.Tensor
    addresses: torch.Tensor
    lengths: torch.Tensor


def random_lists(layout: KvLayout, lengths: list[int], device: torch.device, seed: int = 0) -> Lists:
    """Normal numbers, in blocks of a shuffled order."""
    random = np.random.default_rng(seed)
    counts = [-(-length // layout.block_tokens) for length in lengths]
    order = random.permutation(sum(counts) + 1)[: sum(counts)]
    slab = torch.full(((sum(counts) + 1) * layout.nbytes + 64,), _POISON, dtype=torch.uint8, device=device)
    first = -slab.data_ptr() % 64
    addresses, blocks = [], []
    for length, count in zip(lengths, counts, strict=True):
        blocks.append([_block(layout, min(layout.block_tokens, length - at * layout.block_tokens), random)
                       for at in range(count)])  # fmt: skip
        for block in blocks[-1]:
            start = first + int(order[len(addresses)]) * layout.nbytes
            slab[start : start + layout.nbytes] = torch.from_numpy(block).to(device)
            addresses.append(slab.data_ptr() + start)
    offsets = [0, *np.cumsum(counts).tolist()]
    return Lists(
        slab, blocks,
        *(torch.tensor(numbers, dtype=torch.int64, device=device) for numbers in (offsets, addresses, lengths)),
    )  # fmt: skip


def _block(layout: KvLayout, tokens: int, random: np.random.Generator) -> np.ndarray:
    shape = layout.kv_heads, tokens
    keys = random.standard_normal((*shape, layout.key_width)).astype(np.float32)
    values = None
    if not layout.value_from_key:
        values = random.standard_normal((*shape, layout.value_width)).astype(np.float32)
    content = pack_kv_block(keys, values, layout)
    if layout.is_int4:
        # Packed whole: tokens that are not there share scales with those that are.
        return content
    for head in range(layout.kv_heads):
        for name, part in layout.parts.items():
            start = head * layout.head_nbytes + part.offset
            lying = content[start : start + part.nbytes].reshape(*part.shape, -1)
            if "scales" in name:
                lying[..., tokens:, :] = _POISON
            elif layout.has_pairs:
                # Codes without a scale are finite.
                continue
            elif name == "keys" and not layout.value_from_key:
                by_token = lying.transpose(0, 2, 1, 3)
                for panel in range(part.shape[0]):
                    by_token[panel, max(0, tokens - panel * layout.lanes) :] = _POISON
            else:
                lying[:, tokens:] = _POISON
    return content
