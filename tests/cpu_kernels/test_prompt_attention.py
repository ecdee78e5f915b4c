"""Attention of many tokens against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpu_kernels.prompt_attention import prompt_attention
from cpu_kernels.threads import shared_pool
from offload.devices.host_threads import kernel_pool
from tests.cpu_kernels.tensors import DTYPES, attention_inputs

# Batch, heads, key-value heads, new tokens, all tokens, widths: a whole block and one more; a part of a prompt; one
# head a group; widths that differ and have tails; several tiles of rows and runs of blocks.
SHAPES = [
    (1, 4, 2, 64, 64, 16, 16),
    (2, 6, 2, 65, 65, 20, 40),
    (1, 3, 3, 17, 130, 48, 33),
    (1, 8, 1, 40, 200, 24, 13),
    (1, 4, 2, 130, 520, 128, 128),
]


def _reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, valid: np.ndarray | None = None
) -> torch.Tensor:
    """[B, T, Hq, V] in float64; zeros for a query that sees nothing."""
    group, new, tokens = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    q, k, v = query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    seen = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new).expand(len(q), 1, new, tokens)
    if valid is not None:
        seen = seen & torch.from_numpy(valid)[:, None, None]
    scores = (scale * q @ k.mT).masked_fill(~seen, -torch.inf)
    return (torch.softmax(scores, -1).nan_to_num(0.0) @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    query, key, value = attention_inputs(*shape, dtype)
    found = prompt_attention(query, key, value, 0.3, pool=kernel_pool())
    exact = _reference(query, key, value, 0.3)
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5 * value.double().abs().max()
    assert found.dtype is dtype
    assert found.shape == exact.shape and found.is_contiguous()
    assert ((found.double() - exact).abs() <= bound).all()


def test_padding_is_not_seen_and_sees_nothing_before_it() -> None:
    query, key, value = attention_inputs(2, 4, 2, 70, 90, 16, 16, torch.float32)
    valid = np.ones((2, 90), np.bool_)
    valid[0, :30] = False
    found = prompt_attention(query, key, value, 0.3, valid=valid, pool=kernel_pool())
    assert (found.double() - _reference(query, key, value, 0.3, valid)).abs().max() <= 1e-5
    assert not found[0, :10].any() and found[0, 10:].any()


def test_bits_do_not_depend_on_threads_or_other_sequences() -> None:
    query, key, value = attention_inputs(2, 6, 3, 80, 300, 32, 32, torch.bfloat16)
    expected = prompt_attention(query, key, value, 0.2, pool=shared_pool(1))
    for pool in (shared_pool(3), kernel_pool()):
        assert torch.equal(prompt_attention(query, key, value, 0.2, pool=pool), expected)
    alone = prompt_attention(query[1:], key[1:], value[1:], 0.2, pool=kernel_pool())
    assert torch.equal(alone, expected[1:])


def test_what_does_not_fit_is_refused() -> None:
    query, key, value = attention_inputs(1, 4, 2, 20, 20, 16, 16, torch.float32)
    wrong = [
        (query, key[:, :, :19], value[:, :, :19]),
        (query[:, :3], key, value),
        (query, key.bfloat16(), value),
        (query, key[..., :8], value),
        (query.double(), key.double(), value.double()),
    ]
    for tensors in wrong:
        with pytest.raises(ValueError, match="expected"):
            prompt_attention(*tensors, 0.2, pool=kernel_pool())
