"""Layers of specs: against the parameters of real models, and public models against their published sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload.errors import UnsupportedModelError
from offload.hf.config_spec import spec_of_config
from offload.hf.experts_interface import experts_modules
from offload.hf.skeleton import read_config
from offload.quantisation import Quantisation, make_quantisation
from placement.expert_cost import expert_weights
from placement.model_spec import ModelSpec
from tests.tiny_models import ARCHITECTURES, build_tiny, tiny_config

CONFIGS = Path(__file__).parents[1] / "data" / "configs"

PUBLISHED = {
    # Billions of parameters, all and for a token, as the makers state them; embeddings counted in the first alone.
    "mixtral-8x7b": (46.7, 12.9),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235, 22),
    "gpt-oss-120b": (117, 5.1),
    "glm-4.5-air": (106, 12),
    "deepseek-v3": (671, 37),
}


def public(name: str, quant: str | None = None) -> ModelSpec:
    config = read_config(CONFIGS / name, trust_remote_code=False)
    return spec_of_config(config, name, make_quantisation(quant), dtype=torch.bfloat16, context_tokens=8192)


@pytest.mark.parametrize("name", PUBLISHED)
def test_public_models_have_their_published_sizes(name: str) -> None:
    spec = public(name)
    assert spec.head is not None
    multiplied = sum(one.weights for layer in spec.layers for one in layer.linears) + spec.head.weights
    experts = sum(layer.count * expert_weights(layer) for layer in spec.experts)
    active = sum(layer.top_k * expert_weights(layer) for layer in spec.experts)
    total, for_a_token = PUBLISHED[name]
    assert (multiplied + spec.vocab_size * spec.hidden_size + experts) / 1e9 == pytest.approx(total, rel=0.01)
    # Makers round, and count embeddings or not.
    assert (multiplied + active) / 1e9 == pytest.approx(for_a_token, rel=0.09)
    assert len(spec.layers) == spec.layer_count
    assert [layer.experts for layer in spec.layers if layer.experts is not None] == list(range(len(spec.experts)))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("quant", [None, "int8"])
def test_layers_add_up_to_the_model(model_type: str, quant: str | None) -> None:
    spec = spec_of_config(
        tiny_config(model_type), model_type, make_quantisation(quant), dtype=torch.float32, context_tokens=64
    )
    assert sum(layer.kv_nbytes_per_token for layer in spec.layers) == spec.kv_nbytes_per_token
    model = build_tiny(model_type)
    experts = {id(p) for _, module in experts_modules(model) for p in module.parameters()}
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if ".layers." in name and parameter.dim() == 2 and id(parameter) not in experts
    ]
    assert sum(one.weights for layer in spec.layers for one in layer.linears) == sum(p.numel() for p in matrices)
    if quant is None:
        inside = sum(
            p.numel() * p.element_size()
            for name, p in [*model.named_parameters(), *model.named_buffers()]
            if ".layers." in name and id(p) not in experts
        )
        assert sum(layer.dense_nbytes for layer in spec.layers) == inside
    assert sum(layer.dense_nbytes for layer in spec.layers) < spec.dense_nbytes
    assert spec.head is not None
    assert (spec.head.rows, spec.head.columns) == (spec.vocab_size, spec.hidden_size)


def test_quantised_layers_are_named_by_their_format() -> None:
    spec = public("qwen3-30b-a3b", "int4")
    formats = {one.format for one in spec.layers[0].linears}
    assert formats == {"int4", "bf16"}, "the router stays as it is"
    assert spec.head is not None
    assert spec.head.format == "int8"
    assert spec.layers[0].dense_nbytes >= sum(one.nbytes for one in spec.layers[0].linears)


def test_windows_are_those_of_the_config() -> None:
    windows = [layer.window_tokens for layer in public("gpt-oss-120b").layers]
    assert windows == [128, None] * 18
    assert {layer.window_tokens for layer in public("mixtral-8x7b").layers} == {None}


def test_linear_attention_has_no_cache_that_grows() -> None:
    spec = spec_of_config(tiny_config("qwen3_next"), "x", Quantisation(), dtype=torch.float32, context_tokens=64)
    assert [layer.kv_nbytes_per_token > 0 for layer in spec.layers] == [False, True, False]
    assert [layer.attention_values > 0 for layer in spec.layers] == [False, True, False]
    assert [layer.attention_heads > 0 for layer in spec.layers] == [False, True, False]


def test_attention_has_the_configs_heads() -> None:
    for layer in public("qwen3-30b-a3b").layers:
        assert (layer.attention_heads, layer.attention_values) == (32, 32 * 2 * 128)


def test_a_model_without_experts_is_refused() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("llama", num_hidden_layers=2, hidden_size=32, intermediate_size=32, vocab_size=32)
    with pytest.raises(UnsupportedModelError, match="no routed experts"):
        spec_of_config(config, "dense", Quantisation(), dtype=torch.float32, context_tokens=64)
