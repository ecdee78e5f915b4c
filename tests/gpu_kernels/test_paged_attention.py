"""Attention to lists of KV blocks against float64: every format, every way they lie, and what is not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from formats.kv import KV_FORMATS, KvLayout
from formats.kv_pack import pack_kv_block
from gpu_kernels.paged_attention import paged_attention
from gpu_kernels.paged_attention_reference import paged_attention_reference
from tests.assertions import assert_close
from tests.gpu_kernels.bundles import tolerance_format
from tests.gpu_kernels.kv_lists import random_lists

LATENT = {"kv_heads": 1, "key_width": 48, "value_width": 0, "value_from_key": 32}


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def assert_attention(
    layout: KvLayout,
    lengths: list[int],
    device: torch.device,
    *,
    group: int = 2,
    new: int = 1,
    dtype: torch.dtype = torch.float32,
    firsts: list[int] | None = None,
    valid: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The new tokens are the last of each list, which begins at position firsts[i]."""
    lists = random_lists(layout, lengths, device)
    firsts = [0] * len(lengths) if firsts is None else firsts
    generator = torch.Generator().manual_seed(1)
    heads = layout.kv_heads * group
    query = torch.randn(len(lengths), new, heads, layout.key_width, generator=generator).to(dtype).transpose(1, 2)
    ends = torch.tensor([first + length for first, length in zip(firsts, lengths, strict=True)])
    positions = (ends[:, None] - new + torch.arange(new)).contiguous()
    scale = layout.key_width**-0.5
    seen = {name: value for name, value in options.items() if name in ("window", "softcap")}
    expected = paged_attention_reference(
        query, lists.blocks, lengths, firsts, positions, layout, scale, valid=valid, **seen
    )
    out, lse = paged_attention(
        query.to(device), lists.offsets, lists.addresses, lists.lengths, torch.tensor(firsts, device=device),
        positions.to(device), layout, scale, most_tokens=max(lengths),
        valid=None if valid is None else valid.to(device), **options,
    )  # fmt: skip
    assert out.dtype is lse.dtype is torch.float32
    assert_close(out, expected[0], tolerance_format(dtype))
    assert_close(lse, expected[1], tolerance_format(dtype))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", KV_FORMATS)
def test_formats(format: str, dtype: torch.dtype, device: torch.device) -> None:
    """A list that ends within a block, one of whole blocks, and one of nothing."""
    assert_attention(KvLayout(format, 2, 16, 16), [70, 64, 0], device, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", KV_FORMATS)
def test_latents(format: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_attention(KvLayout(format, block_tokens=64, **LATENT), [100], device, group=3, dtype=dtype, new=2)


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize(("width", "value"), [(1, 3), (20, 40), (33, 65)])
def test_widths_that_layouts_pad(format: str, width: int, value: int, device: torch.device) -> None:
    assert_attention(KvLayout(format, 1, width, value), [66], device)


@pytest.mark.parametrize("format", ["fp32", "fp8_e4m3", "int8", "int4"])
def test_latents_that_layouts_pad(format: str, device: torch.device) -> None:
    """Keys of a part of a panel behind the values, and none behind them."""
    for width in (37, 32):
        layout = KvLayout(format, 1, width, 0, 64, value_from_key=32)
        assert_attention(layout, [65], device)


@pytest.mark.parametrize("size", [(1, 128, 128, 64), (1, 64, 64, 192)])
def test_real_widths(size: tuple[int, int, int, int], device: torch.device) -> None:
    for format in ("bf16", "int4"):
        assert_attention(KvLayout(format, *size), [size[3] + 1], device, dtype=torch.bfloat16, group=4)


@pytest.mark.parametrize("tokens", [16, 32, 48])
def test_small_blocks(tokens: int, device: torch.device) -> None:
    for format in ("fp32", "int8"):
        assert_attention(KvLayout(format, 2, 12, 8, tokens), [3 * tokens - 5, tokens], device)


@pytest.mark.parametrize("new", [1, 5, 8])
@pytest.mark.parametrize("format", ["fp32", "int8"])
def test_several_new_tokens(format: str, new: int, device: torch.device) -> None:
    """24 pairs of 3 heads: two blocks of pairs of 16 would be one of 32. Each token sees those up to itself."""
    assert_attention(KvLayout(format, 2, 16, 16), [70, 67], device, group=3, new=new)


def test_many_heads_of_one_key(device: torch.device) -> None:
    """More pairs than a program takes."""
    assert_attention(KvLayout("fp32", 1, 16, 16), [40], device, group=9, new=4)


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("format", ["fp32", "int4"])
def test_parts(format: str, parts: int, device: torch.device) -> None:
    """Of lists of three tiles, two, and none: some parts see nothing."""
    assert_attention(KvLayout(format, 1, 16, 16), [150, 70, 0], device, parts=parts)


@pytest.mark.parametrize("window", [1, 9, 70])
def test_windows(window: int, device: torch.device) -> None:
    """What lies before every query's window is not looked at."""
    assert_attention(KvLayout("fp32", 1, 16, 16, 16), [90, 20], device, new=3, window=window, parts=2, firsts=[5, 200])


def test_a_soft_cap(device: torch.device) -> None:
    assert_attention(KvLayout("fp32", 2, 16, 16), [70], device, softcap=1.5)


def test_padding(device: torch.device) -> None:
    """By position: of the first list all but five tokens; of the second list everything."""
    valid = torch.ones(2, 100, dtype=torch.bool)
    valid[0, :75], valid[1] = False, False
    assert_attention(KvLayout("bf16", 2, 16, 16, 16), [70, 30], device, valid=valid, firsts=[10, 0], new=2)


def test_tokens_later_than_the_queries_are_not_seen(device: torch.device) -> None:
    """A list that begins behind the queries gives nothing; one that goes beyond them is seen in part."""
    layout = KvLayout("fp32", 1, 16, 16, 16)
    lists = random_lists(layout, [40, 40], device)
    query, positions = _random(2, 1, 1, 16), torch.tensor([[20], [20]])
    told = lists.offsets, lists.addresses, lists.lengths, torch.tensor([21, 0], device=device)
    out, lse = paged_attention(query.to(device), *told, positions.to(device), layout, 0.25, most_tokens=40)
    expected = paged_attention_reference(query, lists.blocks, [40, 40], [21, 0], positions, layout, 0.25)
    assert not out[0].any() and lse[0].isinf().all()
    assert_close(out, expected[0], "fp32")
    assert_close(lse, expected[1], "fp32")


def test_a_large_score_leaves_nothing_of_others(device: torch.device) -> None:
    layout = KvLayout("fp32", 1, 16, 16, 16)
    lists = random_lists(layout, [80], device)
    query, positions = 40 * _random(1, 1, 1, 16), torch.tensor([[79]])
    told = lists.offsets, lists.addresses, lists.lengths, torch.zeros(1, dtype=torch.int64, device=device)
    out, _ = paged_attention(query.to(device), *told, positions.to(device), layout, 4.0, most_tokens=80, parts=3)
    expected, _ = paged_attention_reference(query, lists.blocks, [80], [0], positions, layout, 4.0)
    # Scores of hundreds are rounded to some 1e-5, and so are weights.
    assert_close(out, expected, "fp16")


@pytest.mark.parametrize("format", KV_FORMATS)
def test_equal_inputs_give_equal_bits(format: str, device: torch.device) -> None:
    runs = [
        assert_attention(KvLayout(format, 1, 16, 16), [130], device, dtype=torch.float16, parts=2) for _ in range(2)
    ]
    assert torch.equal(*runs)


def test_numbers_that_a_scale_carries_are_not_lost(device: torch.device) -> None:
    """Weights times scales of 1e-7 would be nothing in fp16."""
    layout = KvLayout("int8", 1, 16, 16)
    random = np.random.default_rng(3)
    keys = random.standard_normal((1, 64, 16)).astype(np.float32)
    block = pack_kv_block(keys, 1e-5 * random.standard_normal((1, 64, 16)).astype(np.float32), layout)
    lists = random_lists(layout, [64], device)
    at = int(lists.addresses[0]) - lists.slab.data_ptr()
    lists.slab[at : at + layout.nbytes] = torch.from_numpy(block).to(device)
    query, positions = _random(1, 2, 1, 16).half(), torch.tensor([[63]])
    told = lists.offsets, lists.addresses, lists.lengths, torch.zeros(1, dtype=torch.int64, device=device)
    out, _ = paged_attention(query.to(device), *told, positions.to(device), layout, 0.25, most_tokens=64)
    assert_close(out, paged_attention_reference(query, [[block]], [64], [0], positions, layout, 0.25)[0], "fp16")


def test_the_default_fills_the_device(device: torch.device) -> None:
    """One list is cut into parts, and the same comes out."""
    whole = assert_attention(KvLayout("fp32", 1, 16, 16), [600], device, parts=1)
    torch.testing.assert_close(assert_attention(KvLayout("fp32", 1, 16, 16), [600], device), whole, rtol=0, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    layout = KvLayout("fp32", 2, 16, 16)
    one, many = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    good = {
        "query": torch.zeros(1, 4, 1, 16), "offsets": many, "addresses": one, "lengths": one, "first_positions": one,
        "query_positions": one[None], "layout": layout, "scale": 1.0, "most_tokens": 1,
    }  # fmt: skip
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"query": torch.zeros(1, 4, 1, 8)}, "query: expected"),
        ({"query": torch.zeros(1, 3, 1, 16)}, "query: expected"),
        ({"query": torch.zeros(1, 4, 1, 16, dtype=torch.float64)}, "query: expected"),
        ({"offsets": one}, "offsets: expected"),
        ({"lengths": one.int()}, "lengths: expected"),
        ({"query_positions": one}, "query_positions: expected"),
        ({"valid": torch.ones(1, 4)}, "valid: expected"),
        ({"window": 0}, "window=0"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"most_tokens": -1}, "most_tokens=-1"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            paged_attention(**(good | change))
