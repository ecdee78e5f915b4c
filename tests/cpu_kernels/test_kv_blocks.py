"""Blocks written, read and packed, against the reference in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpu_kernels.kv_blocks import TokenWriter, pack_block, read_tokens, write_tokens
from cpu_kernels.paged_attention_reference import (
    block_bytes,
    pack_block_reference,
    read_tokens_reference,
    write_tokens_reference,
)
from formats.kv import KV_FORMATS, KvLayout
from tests.cpu_kernels.kv_blocks import empty_blocks, random_blocks

SHAPES = [(2, 24, 20, 64, 0), (1, 130, 64, 64, 0), (1, 72, 0, 64, 64), (1, 64, 0, 128, 64)]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INT64 = np.int64


def _tensors(layout: KvLayout, batch: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As a model has them: transposed from [batch, tokens, heads, width]."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (batch, tokens, layout.kv_heads)
    spread = torch.exp(2 * torch.randn(layout.key_width, generator=generator))
    keys = (torch.randn(*shape, layout.key_width, generator=generator) * spread).to(dtype).transpose(1, 2)
    if layout.value_from_key:
        return keys, None
    return keys, torch.randn(*shape, layout.value_width, generator=generator).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("format", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_written_tokens_are_read_back(format: str, shape: tuple[int, ...]) -> None:
    layout = KvLayout(format, *shape)
    blocks, others = (empty_blocks(layout, [200, 130]) for _ in range(2))
    first = np.array([61, 3], INT64)
    keys, values = _tensors(layout, 2, 77, DTYPES[format])
    write_tokens(keys, values, blocks.offsets, blocks.addresses, first, layout)
    write_tokens_reference(keys, values, others.offsets, others.addresses, first, layout)
    for sequence in range(2):
        mine = blocks.addresses[blocks.offsets[sequence] : blocks.offsets[sequence + 1]]
        theirs = others.addresses[others.offsets[sequence] : others.offsets[sequence + 1]]
        at = int(first[sequence])
        found_keys, found_values = read_tokens(mine, at, 77, layout, DTYPES[format])
        assert torch.equal(found_keys, keys[sequence])
        expected = read_tokens_reference(theirs, at, 77, layout)[1]
        assert torch.equal(found_values.float(), expected)
        before, _ = read_tokens(mine, 0, at, layout)
        assert before.isnan().all()


@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_token_after_token_is_written_as_all_at_once(format: str, shape: tuple[int, ...]) -> None:
    layout = KvLayout(format, *shape)
    found, expected = (empty_blocks(layout, [layout.block_tokens]) for _ in range(2))
    keys, values = _tensors(layout, 1, 20, torch.bfloat16)
    write_tokens(keys, values, expected.offsets, expected.addresses, np.array([7], INT64), layout)
    parts = [(keys[:, :, i : i + 1], None if values is None else values[:, :, i : i + 1]) for i in range(20)]
    address = int(found.addresses[0])
    writer = TokenWriter(*parts[0], address, layout)
    for place, part in enumerate(parts, 7):
        assert writer.takes(*part, address)
        writer.write(*part, place)
    mine, theirs = (read_tokens(blocks.addresses, 7, 20, layout) for blocks in (found, expected))
    assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))
    assert not writer.takes(*parts[0], address + 64)
    assert not writer.takes(keys[:, :, :2], parts[0][1], address)
    assert not writer.takes(parts[0][0].float(), parts[0][1], address)
    with pytest.raises(ValueError, match="place 128 of a block"):
        writer.write(*parts[0], 128)
    with pytest.raises(ValueError, match="keys: expected"):
        TokenWriter(keys[..., :-1][:, :, :1], parts[0][1], address, layout).write(
            keys[..., :-1][:, :, :1], parts[0][1], 0
        )


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_format_is_read(format: str, shape: tuple[int, ...]) -> None:
    blocks = random_blocks(KvLayout(format, *shape), [256])
    for first, tokens in ((0, 256), (63, 2), (70, 100), (5, 0)):
        found = read_tokens(blocks.addresses, first, tokens, blocks.layout)
        expected = read_tokens_reference(blocks.addresses, first, tokens, blocks.layout)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape
            # The factors of two that kernels take back later move no bit; a product and a sum may be one rounding.
            assert torch.allclose(one, other, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("format", ["fp8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("source", ["fp32", "bf16"])
def test_packed_bytes_are_those_of_the_reference(format: str, shape: tuple[int, ...], source: str) -> None:
    plain, layout = KvLayout(source, *shape), KvLayout(format, *shape)
    blocks, packed = empty_blocks(plain, [layout.block_tokens]), empty_blocks(layout, [layout.block_tokens] * 2)
    keys, values = _tensors(plain, 1, layout.block_tokens, torch.float32)
    keys[:, :, :33, :8] = 0
    keys[:, 0, 2, 3] = torch.inf
    keys[:, 0, 50, 9] = torch.nan
    if values is not None:
        values[:, 0, :, 3:] *= 1e-38
        values[:, 0, 7] = -0.0
    write_tokens(keys, values, blocks.offsets, blocks.addresses, np.zeros(1, INT64), plain)
    found, expected = (int(address) for address in packed.addresses[:2])
    pack_block(int(blocks.addresses[0]), plain, found, layout)
    pack_block_reference(int(blocks.addresses[0]), plain, expected, layout)
    assert np.array_equal(block_bytes(found, layout), block_bytes(expected, layout))


def test_what_does_not_fit_is_refused() -> None:
    layout = KvLayout("fp32", 2, 24, 20)
    blocks = empty_blocks(layout, [100])
    keys, values = _tensors(layout, 1, 10, torch.float32)
    zero = np.zeros(1, INT64)
    for message, arguments in (
        ("packed whole", (keys, values, blocks.offsets, blocks.addresses, zero, KvLayout("int8", 2, 24, 20))),
        ("values: expected a tensor", (keys, None, blocks.offsets, blocks.addresses, zero, layout)),
        ("keys: expected", (keys[:, :1], values, blocks.offsets, blocks.addresses, zero, layout)),
        ("10 tokens do not fit", (keys, values, blocks.offsets, blocks.addresses, zero + 120, layout)),
    ):
        with pytest.raises(ValueError, match=message):
            write_tokens(*arguments)
    with pytest.raises(ValueError, match="of 2 blocks"):
        read_tokens(blocks.addresses, 100, 50, layout)
    with pytest.raises(ValueError, match="cannot be packed"):
        pack_block(0, layout, 0, KvLayout("int8", 2, 24, 24))
