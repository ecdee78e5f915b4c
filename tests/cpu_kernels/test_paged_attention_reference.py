"""The reference of paged attention against torch's own attention."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from cpu_kernels.paged_attention_reference import (
    merge_lse_reference,
    pack_block_reference,
    paged_attention_reference,
    read_tokens_reference,
    write_tokens_reference,
)
from formats.kv import KvLayout
from tests.cpu_kernels.kv_blocks import empty_blocks, random_blocks


def test_equals_attention_of_torch_whole_and_in_parts() -> None:
    layout = KvLayout("fp32", 2, 24, 20, 32)
    blocks = random_blocks(layout, [70, 41])
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 6, 3, 24, generator=generator)
    positions = np.array([[67, 68, 69], [38, 39, 40]], np.int64)
    zero = np.zeros(2, np.int64)
    found, lse = paged_attention_reference(
        query, blocks.offsets, blocks.addresses, blocks.lengths, zero, positions, layout, 0.3, window=50
    )
    for sequence, length in enumerate((70, 41)):
        mine = blocks.addresses[blocks.offsets[sequence] : blocks.offsets[sequence + 1]]
        keys, values = read_tokens_reference(mine, 0, length, layout)
        at = torch.arange(length)[None]
        here = torch.from_numpy(positions[sequence])[:, None]
        mask = (at <= here) & (at > here - 50)
        k, v = (part.double().repeat_interleave(3, 0) for part in (keys, values))
        expected = scaled_dot_product_attention(query[sequence].double(), k, v, attn_mask=mask, scale=0.3)
        assert (found[sequence] - expected).abs().max() < 1e-12
    first = np.array([0, 2, 3], np.int64), np.array([64, 32], np.int64)
    heads = blocks.addresses[[0, 1, 3]], blocks.addresses[[2, 4]]
    rest = np.array([0, 1, 2], np.int64), np.array([6, 9], np.int64)
    part = paged_attention_reference(query, first[0], heads[0], first[1], zero, positions, layout, 0.3, window=50)
    last = paged_attention_reference(query, rest[0], heads[1], rest[1], first[1], positions, layout, 0.3, window=50)
    assert (merge_lse_reference([part, last]) - found).abs().max() < 1e-12
    sinks = torch.linspace(-1, 1, 6)
    with_sinks = merge_lse_reference([part, last], sinks)
    share = torch.exp(lse) / (torch.exp(lse) + torch.exp(sinks.double())[None, :, None])
    assert (with_sinks - found * share[..., None]).abs().max() < 1e-12


def test_written_tokens_are_read_and_packed() -> None:
    layout = KvLayout("bf16", 2, 24, 20)
    blocks = empty_blocks(layout, [70])
    keys, values = torch.randn(1, 2, 67, 24).bfloat16(), torch.randn(1, 2, 67, 20).bfloat16()
    write_tokens_reference(keys, values, blocks.offsets, blocks.addresses, np.array([3], np.int64), layout)
    found_keys, found_values = read_tokens_reference(blocks.addresses, 3, 67, layout)
    assert torch.equal(found_keys, keys[0].float()) and torch.equal(found_values, values[0].float())
    packed = empty_blocks(KvLayout("int8", 2, 24, 20), [64])
    write_tokens_reference(
        keys[:, :, :64], values[:, :, :64], blocks.offsets, blocks.addresses, np.zeros(1, np.int64), layout
    )
    pack_block_reference(int(blocks.addresses[0]), layout, int(packed.addresses[0]), packed.layout)
    near_keys, _ = read_tokens_reference(packed.addresses, 0, 64, packed.layout)
    assert (near_keys - keys[0, :, :64].float()).abs().max() < keys.float().abs().max() / 250
