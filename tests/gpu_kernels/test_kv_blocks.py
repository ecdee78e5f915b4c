"""Writing tokens into blocks: the bytes of `formats.kv_pack` where tokens go, and what was there elsewhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from formats.kv import KvLayout
from formats.kv_pack import pack_kv_block
from gpu_kernels.kv_blocks import write_tokens
from gpu_kernels.launch import DTYPE_OF_FORMAT

_POISON = 0xA5


def _assert_written(
    layout: KvLayout, dtype: torch.dtype, device: torch.device, firsts: list[int], tokens: int, strided: bool = True
) -> None:
    count = len(firsts)
    generator = torch.Generator().manual_seed(tokens)

    def random(width: int) -> torch.Tensor:
        shape = (count, tokens, layout.kv_heads, width) if strided else (count, layout.kv_heads, tokens, width)
        numbers = torch.randn(*shape, generator=generator).to(dtype)
        return numbers.transpose(1, 2) if strided else numbers

    keys = random(layout.key_width)
    values = None if layout.value_from_key else random(layout.value_width)
    # The same bytes, with channels that fill up a panel as if they were the user's: a token has zeros there.
    whole = replace(layout, key_width=layout.key_columns, value_width=layout.value_columns)
    blocks = [-(-(first + tokens) // layout.block_tokens) for first in firsts]
    total = sum(blocks)
    slab = torch.full((total * layout.nbytes + 64,), _POISON, dtype=torch.uint8, device=device)
    start = -slab.data_ptr() % 64
    order = np.random.default_rng(1).permutation(total)
    addresses = slab.data_ptr() + start + torch.from_numpy(order) * layout.nbytes
    offsets = torch.tensor([0, *np.cumsum(blocks).tolist()])
    write_tokens(
        keys.to(device), None if values is None else values.to(device), offsets.to(device), addresses.to(device),
        torch.tensor(firsts, device=device), layout,
    )  # fmt: skip
    found = slab[start : start + total * layout.nbytes].cpu().numpy().reshape(total, layout.nbytes)
    for sequence, first in enumerate(firsts):
        for number in range(blocks[sequence]):
            widths = whole.key_width, whole.value_width
            numbers = [
                _in_block(side, sequence, number, first, tokens, layout, width)
                for side, width in zip((keys, values), widths, strict=True)
            ]
            expected = np.full(layout.nbytes, _POISON, np.uint8)
            # What is written is where two backgrounds agree.
            ones = [pack_kv_block(*_filled(numbers, background), whole) for background in (1.0, 2.0)]
            size = layout.bits // 8
            same = (ones[0].reshape(-1, size) == ones[1].reshape(-1, size)).all(1)
            written = np.repeat(same, size) & ~_padding(whole)
            expected[written] = ones[0][written]
            assert np.array_equal(found[order[int(offsets[sequence]) + number]], expected)


def _in_block(
    side: torch.Tensor | None, sequence: int, number: int, first: int, tokens: int, layout: KvLayout, width: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """[heads, block_tokens, width], zero past the side's own, and which tokens are new."""
    if side is None:
        return None
    size = layout.block_tokens
    numbers = np.zeros((layout.kv_heads, size, width), np.float32)
    places = number * size + np.arange(size) - first
    new = (places >= 0) & (places < tokens)
    numbers[:, new, : side.shape[3]] = side[sequence].float().numpy()[:, places[new]]
    return numbers, new


def _filled(numbers: list[tuple[np.ndarray, np.ndarray] | None], background: float) -> list[np.ndarray | None]:
    return [None if one is None else np.where(one[1][None, :, None], one[0], np.float32(background))
            for one in numbers]  # fmt: skip


def _padding(layout: KvLayout) -> np.ndarray:
    """Bytes that belong to no number."""
    ones = np.ones((layout.kv_heads, layout.block_tokens, layout.key_width), np.float32)
    values = None
    if not layout.value_from_key:
        values = np.ones((layout.kv_heads, layout.block_tokens, layout.value_width), np.float32)
    size = layout.bits // 8
    return np.repeat((pack_kv_block(ones, values, layout).reshape(-1, size) == 0).all(1), size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", [*DTYPE_OF_FORMAT])
def test_formats(format: str, dtype: torch.dtype, device: torch.device) -> None:
    """One token each: the first of a block, one in the middle, and the last."""
    _assert_written(KvLayout(format, 2, 20, 8), dtype, device, [64, 30, 63], 1)


@pytest.mark.parametrize("strided", [False, True])
def test_tokens_that_cross_blocks(strided: bool, device: torch.device) -> None:
    _assert_written(KvLayout("fp32", 2, 12, 20, 16), torch.float32, device, [5, 0], 41, strided)


@pytest.mark.parametrize("width", [37, 32])
def test_latents(width: int, device: torch.device) -> None:
    layout = KvLayout("bf16", 1, width, 0, 32, value_from_key=32)
    _assert_written(layout, torch.bfloat16, device, [30], 3)


def test_what_does_not_fit_is_refused() -> None:
    layout, one = KvLayout("fp32", 2, 16, 16), torch.zeros(1, dtype=torch.int64)
    keys, lists = torch.zeros(1, 2, 1, 16), (torch.zeros(2, dtype=torch.int64), one, one)
    for wrong, message in (
        ((keys, None, *lists, layout), "values: expected"),
        ((keys, keys[..., :8], *lists, layout), "values: expected"),
        ((keys.double(), keys.double(), *lists, layout), "keys: expected"),
        ((keys, keys, lists[0].int(), one, one, layout), "offsets: expected"),
        ((keys, keys, *lists, KvLayout("int8", 2, 16, 16)), "packed whole"),
    ):
        with pytest.raises(ValueError, match=message):
            write_tokens(*wrong)
