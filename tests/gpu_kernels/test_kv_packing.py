"""Packing on a device: the bytes of `formats.kv_pack`, and what they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from formats.kv import KV_FORMATS, KvLayout
from formats.kv_pack import pack_kv_block, unpack_kv_block
from gpu_kernels.kv_packing import pack_blocks, unpack_blocks

PACKED = ("fp8_e4m3", "int8", "int4")
SHAPES = [(2, 16, 16, 0), (1, 33, 65, 0), (3, 1, 3, 0), (1, 64, 128, 0), (1, 48, 0, 32), (1, 37, 0, 32), (1, 32, 0, 32)]


def _layout(format: str, shape: tuple[int, int, int, int], tokens: int = 64) -> KvLayout:
    heads, width, value, from_key = shape
    return KvLayout(format, heads, width, value, tokens, from_key)


def _numbers(layout: KvLayout, blocks: int, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Normal numbers of several magnitudes, zeros, ties and numbers that are not."""
    random = np.random.default_rng(seed)

    def side(width: int) -> np.ndarray:
        shape = blocks, layout.kv_heads, layout.block_tokens, width
        numbers = random.standard_normal(shape) * 10.0 ** random.integers(-6, 3, shape[:3])[..., None]
        numbers[0, 0, :3] = 0
        numbers[0, 0, 3] = -0.0
        numbers[-1, -1, 5] = np.round(numbers[-1, -1, 5] * 2) / 2
        numbers[0, -1, 40, width // 2] = np.nan
        numbers[-1, 0, 50, 0] = np.inf
        numbers[-1, 0, 51, 0] = 1e-38
        return numbers.astype(np.float32)

    return side(layout.key_width), None if layout.value_from_key else side(layout.value_width)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", PACKED)
def test_bytes(format: str, shape: tuple[int, int, int, int], device: torch.device) -> None:
    layout = _layout(format, shape)
    keys, values = _numbers(layout, 3, seed=sum(shape))
    found = pack_blocks(
        torch.from_numpy(keys).to(device), None if values is None else torch.from_numpy(values).to(device), layout
    )
    for index in range(3):
        expected = pack_kv_block(keys[index], None if values is None else values[index], layout)
        assert np.array_equal(found[index].cpu().numpy(), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", KV_FORMATS)
def test_numbers(format: str, shape: tuple[int, int, int, int], device: torch.device) -> None:
    layout = _layout(format, shape)
    keys, values = _numbers(layout, 2, seed=1)
    blocks = np.stack([pack_kv_block(keys[at], None if values is None else values[at], layout) for at in range(2)])
    sides = unpack_blocks(torch.from_numpy(blocks).to(device), layout)
    for at in range(2):
        for found, expected in zip(sides, unpack_kv_block(blocks[at], layout), strict=True):
            assert np.array_equal(found[at].cpu().numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("tokens", [16, 48])
def test_small_blocks(tokens: int, device: torch.device) -> None:
    layout = _layout("int8", (2, 12, 8, 0), tokens)
    generator = torch.Generator().manual_seed(tokens)
    keys = torch.randn(1, 2, tokens, 12, generator=generator)
    values = torch.randn(1, 2, tokens, 8, generator=generator)
    found = pack_blocks(keys.to(device), values.to(device), layout)
    assert np.array_equal(found[0].cpu().numpy(), pack_kv_block(keys[0].numpy(), values[0].numpy(), layout))


def test_what_does_not_fit_is_refused() -> None:
    layout, latent = _layout("int8", (2, 16, 16, 0)), _layout("int8", (1, 48, 0, 32))
    keys = torch.zeros(1, 2, 64, 16)
    for wrong in ((keys, keys[:, :1], layout), (keys.half(), keys, layout), (keys[:, :, :63], keys[:, :, :63], layout)):
        with pytest.raises(ValueError, match="s: expected float32"):
            pack_blocks(*wrong)
    for values, one in ((None, layout), (keys, latent)):
        with pytest.raises(ValueError, match="values: expected"):
            pack_blocks(keys, values, one)
    with pytest.raises(ValueError, match="is not packed"):
        pack_blocks(keys, keys, _layout("bf16", (2, 16, 16, 0)))
    with pytest.raises(ValueError, match="blocks: expected"):
        unpack_blocks(torch.zeros(1, layout.nbytes - 1, dtype=torch.uint8), layout)
