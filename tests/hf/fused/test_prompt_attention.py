"""Prompts in bf16 where torch has instructions for it too: whoever attends, the result is attention."""

from __future__ import annotations

import pytest
import torch

from cpu_kernels.panel_mlp import multiplies_pairs
from cpu_kernels.prompt_attention import prompt_attention
from offload.devices.host_threads import kernel_pool
from offload.hf.fused.attention import attend

WIDTH = 32


class _Attention(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


def _numbers(heads: int, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, tokens, WIDTH, generator=generator).to(torch.bfloat16)


def _exactly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    new, tokens = query.shape[2], key.shape[2]
    key, value = (part.double().repeat_interleave(2, 1) for part in (key, value))
    scores = query.double() @ key.transpose(2, 3) * WIDTH**-0.5
    seen = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize(("new", "before"), [(255, 0), (256, 0), (300, 0), (256, 40), (255, 40)])
def test_equals_float64(new: int, before: int) -> None:
    query, key, value = _numbers(4, new, 1), _numbers(2, new + before, 2), _numbers(2, new + before, 3)
    mask = torch.ones(new, new + before, dtype=torch.bool).tril(before)[None, None] if before else None
    out, weights = attend(_Attention(), query, key, value, mask)
    assert weights is None
    torch.testing.assert_close(out.double(), _exactly(query, key, value), rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.skipif(not multiplies_pairs(), reason="needs VDPBF16PS and no AMX")
def test_the_kernel_attends_to_long_prompts() -> None:
    query, key, value = _numbers(4, 256, 1), _numbers(2, 256, 2), _numbers(2, 256, 3)
    out, _ = attend(_Attention(), query, key, value, None)
    assert torch.equal(out, prompt_attention(query, key, value, WIDTH**-0.5, pool=kernel_pool()))
