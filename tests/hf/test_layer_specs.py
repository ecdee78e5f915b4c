"""Layers of specs: against the parameters of real models, and public models against their published sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from offload.errors import UnsupportedModelError
from offload.hf.config_spec import spec_of_config
from offload.hf.experts_interface import experts_modules
from offload.hf.skeleton import read_config
from offload.quantisation import Quantisation, make_quantisation
from placement.expert_cost import expert_weights
from placement.model_spec import ModelSpec
from tests.dense_models import dense_config
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
    "llama-2-7b": (6.74, 6.74),
    "llama-3.3-70b": (70.6, 70.6),
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


def test_a_dense_model_has_layers_and_no_experts() -> None:
    config = dense_config("gpt2", num_hidden_layers=2)
    spec = spec_of_config(config, "dense", Quantisation(), dtype=torch.float32, context_tokens=48)
    assert (spec.experts, spec.expert_count, spec.expert_nbytes, spec.top_k) == ((), 0, 0, 0)
    model = AutoModelForCausalLM.from_config(config)
    assert spec.dense_nbytes == sum(4 * one.numel() for one in {*model.parameters(), *model.buffers()})
    assert [layer.dense_nbytes for layer in spec.layers] == [
        sum(4 * one.numel() for one in (*block.parameters(), *block.buffers())) for block in model.transformer.h
    ]
    assert [layer.kv_nbytes_per_token for layer in spec.layers] == [2 * 48 * 4] * 2


def test_heads_that_differ_from_layer_to_layer() -> None:
    config = AutoConfig.for_model(
        "gemma4_text", vocab_size=99, hidden_size=48, intermediate_size=72, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, global_head_dim=32, sliding_window=8, vocab_size_per_layer_input=99,
        hidden_size_per_layer_input=8, pad_token_id=0,
    )  # fmt: skip
    spec = spec_of_config(config, "gemma", Quantisation(), dtype=torch.float32, context_tokens=64)
    assert [layer.window_tokens for layer in spec.layers] == [8] * 5 + [None]
    assert [layer.attention_values for layer in spec.layers if layer.kv_nbytes_per_token] == [4 * 2 * 16] * 5 + [
        4 * 2 * 32
    ]


@pytest.mark.parametrize("model_type", ["blt", "doge"])
def test_what_cannot_be_planned_is_refused_by_name(model_type: str) -> None:
    more = {"is_moe": True, "num_experts": 16, "hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 4}
    config = AutoConfig.for_model(model_type, **(more if model_type == "doge" else {}))
    with pytest.raises(UnsupportedModelError, match=r"num_hidden_layers|DogeCDMoE"):
        spec_of_config(config, "x", Quantisation(), dtype=torch.float32, context_tokens=64)
