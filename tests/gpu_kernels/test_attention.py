"""Attention in parts, merged, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu_kernels.attention import attention_partial, merge_attention
from gpu_kernels.attention_reference import attention_reference
from tests.assertions import assert_close
from tests.gpu_kernels.bundles import tolerance_format


def assert_attention(
    shape: tuple[int, int, int, int, int],
    lengths: list[int],
    device: torch.device,
    *,
    depth: int = 24,
    value: int = 16,
    dtype: torch.dtype = torch.float32,
    parts: int = 1,
    **options: Any,
) -> None:
    """Of shape (batch, query heads, KV heads, queries, keys); keys past a sequence's length are poison."""
    batch, heads, kv_heads, queries, keys = shape
    generator = torch.Generator().manual_seed(keys)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    q = random(batch, queries, heads, depth).transpose(1, 2)
    k, v = random(batch, kv_heads, keys, depth), random(batch, keys, kv_heads, value).transpose(1, 2)
    options = {"scale": depth**-0.5, "first_query": 0, "causal": True, "window": 0, **options}
    expected, expected_lse = attention_reference(q, k, v, lengths, **options)
    for sequence, length in enumerate(lengths):
        k[sequence, :, length:] = torch.nan
        v[sequence, :, length:] = torch.nan
    # Moved as they lie, strides and all.
    moved = [tensor.to(device) for tensor in (q, k, v)]
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    out, lse = attention_partial(*moved, counts, parts=parts, **options)
    assert out.shape[0] == parts
    merged, merged_lse = merge_attention(out, lse, dtype)
    assert merged.dtype is dtype
    assert_close(merged, expected, tolerance_format(dtype))
    assert_close(merged_lse, expected_lse, tolerance_format(dtype))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_new_token(dtype: torch.dtype, parts: int, device: torch.device) -> None:
    """Sequences of all keys, of a key more than a block, and of none."""
    lengths = [130, 65, 0]
    assert_attention((3, 4, 2, 1, 130), lengths, device, dtype=dtype, parts=parts, first_query=129, causal=False)


def test_more_parts_than_keys(device: torch.device) -> None:
    assert_attention((1, 2, 2, 1, 3), [3], device, parts=4, causal=False)


def test_a_prompt(device: torch.device) -> None:
    """70 queries of 2 heads a group: a block of 64 pairs ends in the middle of a head."""
    assert_attention((1, 4, 2, 35, 35), [35], device, dtype=torch.bfloat16)
    assert_attention((1, 2, 1, 35, 70), [70], device, parts=2, first_query=35)


def test_a_window(device: torch.device) -> None:
    assert_attention((1, 2, 1, 20, 80), [80], device, first_query=60, window=9, parts=2)


def test_keys_later_than_the_queries_are_not_seen(device: torch.device) -> None:
    assert_attention((1, 1, 1, 4, 8), [8], device, first_query=-2)


@pytest.mark.parametrize(("depth", "value"), [(64, 64), (192, 128), (576, 512), (1, 3)])
def test_sizes_of_heads(depth: int, value: int, device: torch.device) -> None:
    assert_attention((1, 2, 1, 1, 40), [40], device, depth=depth, value=value, causal=False, dtype=torch.bfloat16)


def test_a_large_score_leaves_nothing_of_others(device: torch.device) -> None:
    """Scores of hundreds would overflow without the maximum taken off."""
    assert_attention((1, 1, 1, 2, 40), [40], device, first_query=38, scale=100.0, parts=2)


def test_merge_of_parts_that_saw_nothing(device: torch.device) -> None:
    parts = torch.full((2, 3, 5), torch.nan, device=device)
    lse = torch.full((2, 3), -torch.inf, device=device)
    parts[1, 2], lse[1, 2] = 4.0, -1000.0
    out, merged = merge_attention(parts, lse)
    assert torch.equal(out.cpu(), torch.tensor([[0.0] * 5, [0.0] * 5, [4.0] * 5]))
    assert merged.tolist() == [-torch.inf, -torch.inf, -1000.0]


def test_the_default_fills_the_device(device: torch.device) -> None:
    q, k = torch.randn(1, 1, 1, 16, device=device), torch.randn(1, 1, 1100, 16, device=device)
    out, _ = attention_partial(q, k, k, torch.tensor([1100], dtype=torch.int32, device=device), scale=1.0, causal=False)
    assert out.shape[0] == 4


def test_what_does_not_fit_is_refused() -> None:
    q, k, lengths = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 8, 16), torch.tensor([8], dtype=torch.int32)
    for wrong in (
        (q, k.half(), k, lengths),
        (q[:, :3], k, k, lengths),
        (q, k, k[:, :, :4], lengths),
        (q, k, k, lengths.long()),
        (q, k[..., ::2], k, lengths),
    ):
        with pytest.raises(ValueError, match="attention: expected"):
            attention_partial(*wrong, scale=1.0)
    for parts, lse in (
        (q, q),
        (q.half(), q[..., 0]),
        (q[:0], q[:0, ..., 0]),
        (q.transpose(0, 1), q[..., 0].transpose(0, 1)),
    ):
        with pytest.raises(ValueError, match="expected contiguous fp32 parts"):
            merge_attention(parts, lse)
