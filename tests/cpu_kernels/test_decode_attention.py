"""Attention of one token against float64."""

from __future__ import annotations

import pytest
import torch

from cpu_kernels.decode_attention import decode_attention
from cpu_kernels.decode_attention_reference import decode_attention_reference
from cpu_kernels.threads import shared_pool
from offload.devices.host_threads import kernel_pool
from tests.cpu_kernels.tensors import DTYPES, attention_inputs

# One token; a run's end; several runs; one head a group; widths that differ and have tails; several sequences.
SHAPES = [
    (1, 4, 4, 1, 16, 16),
    (1, 8, 2, 255, 24, 13),
    (2, 6, 2, 256, 20, 40),
    (1, 5, 1, 257, 128, 128),
    (3, 3, 3, 1030, 48, 33),
]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return attention_inputs(*shape[:3], 1, *shape[3:], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    query, key, value = _inputs(shape, dtype)
    found = decode_attention(query, key, value, 0.3, kernel_pool())
    exact = decode_attention_reference(query, key, value, 0.3)
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5 * value.double().abs().max()
    assert found.dtype is dtype
    assert found.shape == exact.shape and found.is_contiguous()
    assert ((found.double() - exact).abs() <= bound).all()


def test_bits_do_not_depend_on_threads_or_other_sequences() -> None:
    query, key, value = _inputs((2, 6, 3, 700, 32, 32), torch.bfloat16)
    expected = decode_attention(query, key, value, 0.2, shared_pool(1))
    for pool in (shared_pool(3), kernel_pool()):
        assert torch.equal(decode_attention(query, key, value, 0.2, pool), expected)
    alone = decode_attention(query[1:], key[1:], value[1:], 0.2, kernel_pool())
    assert torch.equal(alone, expected[1:])


def test_scores_far_apart_stay_finite() -> None:
    query, key, value = _inputs((1, 2, 1, 300, 16, 16), torch.float32)
    found = decode_attention(1e3 * query, key, value, 1e2, kernel_pool())
    exact = decode_attention_reference(1e3 * query, key, value, 1e2)
    assert (found.double() - exact).abs().max() <= 1e-3


def test_a_nan_is_not_hidden() -> None:
    query, key, value = _inputs((1, 2, 2, 20, 16, 16), torch.float32)
    key[0, 1, 3, 2] = torch.nan
    found = decode_attention(query, key, value, 0.2, kernel_pool())
    assert found[0, 0, 1].isnan().all() and found[0, 0, 0].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    query, key, value = _inputs((1, 4, 2, 20, 16, 16), torch.float32)
    wrong = [
        (query.expand(1, 4, 2, 16), key, value),
        (query[:, :3], key, value),
        (query, key[:, :, :0], value[:, :, :0]),
        (query, key[..., ::2], value),
        (query, key.transpose(1, 2), value.transpose(1, 2)),
        (query, key.bfloat16(), value),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="decode_attention: expected"):
            decode_attention(*arguments, 0.2, kernel_pool())
