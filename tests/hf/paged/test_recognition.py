"""Attention functions are known by what they compute."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.qwen3_moe import modeling_qwen3_moe

from offload.hf.paged.recognition import is_softmax_attention
from tests.tiny_models import build_tiny


def _attention(model_type: str) -> torch.nn.Module:
    return build_tiny(model_type).model.layers[0].self_attn  # type: ignore[no-any-return]


def test_eager_functions_of_families_are_recognised() -> None:
    assert is_softmax_attention(modeling_qwen3_moe.eager_attention_forward, _attention("qwen3_moe"), has_sinks=False)
    assert is_softmax_attention(modeling_gpt_oss.eager_attention_forward, _attention("gpt_oss"), has_sinks=True)


def test_sinks_that_a_function_uses_without_being_given_them_are_noticed() -> None:
    assert not is_softmax_attention(modeling_gpt_oss.eager_attention_forward, _attention("gpt_oss"), has_sinks=False)


def test_anything_else_is_not() -> None:
    module = _attention("qwen3_moe")

    def soft_capped(module: Any, query: Any, key: Any, value: Any, mask: Any, **named: Any) -> Any:
        capped = {**named, "scaling": named["scaling"] * 0.99}
        return modeling_qwen3_moe.eager_attention_forward(module, query, key, value, mask, **capped)

    def broken(*_args: Any, **_named: Any) -> Any:
        raise TypeError("no such attention")

    assert not is_softmax_attention(soft_capped, module, has_sinks=False)
    assert not is_softmax_attention(broken, module, has_sinks=False)
