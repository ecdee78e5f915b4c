import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from offload.checkpoint.moe_modules import find_experts
from offload.errors import UnsupportedModelError
from tests.checkpoint.conftest import meta_skeleton
from tests.tiny_models import tiny_config

SIZES = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def skeleton(model_type, **more):
    return meta_skeleton(AutoConfig.for_model(model_type, **SIZES, **more))


def test_sizes_come_from_shapes():
    deepseek = find_experts(meta_skeleton(tiny_config("deepseek_v3")))
    assert [module.path for module in deepseek] == [f"model.layers.{layer}.mlp.experts" for layer in (1, 2)]
    assert (deepseek[0].hidden, deepseek[0].intermediate, deepseek[0].count) == (48, 40, 8)
    oss = find_experts(meta_skeleton(tiny_config("gpt_oss")))[0]
    assert oss.flags.is_transposed and oss.flags.has_bias and not oss.flags.is_concatenated
    assert (oss.hidden, oss.intermediate, oss.count) == (48, 40, 6)


def test_a_dense_model_has_none():
    assert find_experts(skeleton("llama")) == []


FOREIGN = {
    "llama4_text": {"intermediate_size_mlp": 72, "num_local_experts": 4, "head_dim": 16},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 16},
    "longcat_flash": {"n_routed_experts": 4},
    "doge": {"is_moe": True, "num_experts": 16},
}


@pytest.mark.parametrize("model_type", FOREIGN)
def test_experts_out_of_the_interface_are_refused_by_class(model_type):
    with pytest.raises(UnsupportedModelError, match=r"found \w+Mo[eE]"):
        find_experts(skeleton(model_type, **FOREIGN[model_type]))


def mixtral():
    return meta_skeleton(tiny_config("mixtral"))


class OwnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2, device="meta")])


class OwnExperts(nn.Module):
    pass


@pytest.mark.parametrize("block", [OwnBlock, OwnExperts])
def test_one_foreign_block_among_known_ones_is_refused(block):
    model = mixtral()
    model.model.layers[1].mlp = block()
    with pytest.raises(UnsupportedModelError, match=block.__name__) as caught:
        find_experts(model)
    assert "layers.1.mlp" in str(caught.value)


def test_norm_after_each_expert_is_refused():
    model = mixtral()
    model.model.layers[0].mlp.experts.has_post_expert_norm = True
    with pytest.raises(UnsupportedModelError, match="norm after each expert"):
        find_experts(model)


def test_parameters_that_are_not_known_are_refused():
    model = mixtral()
    model.model.layers[0].mlp.experts.scale = nn.Parameter(torch.ones(6, device="meta"))
    with pytest.raises(UnsupportedModelError, match="scale"):
        find_experts(model)


def test_shapes_that_contradict_each_other_are_refused():
    model = mixtral()
    model.model.layers[0].mlp.experts.down_proj = nn.Parameter(torch.ones(6, 48, 39, device="meta"))
    with pytest.raises(UnsupportedModelError, match=r"\[6, 78, 48\].*\[6, 80, 48\]"):
        find_experts(model)


def test_shared_experts_are_not_routed():
    model = AutoModelForCausalLM.from_config(tiny_config("qwen2_moe"))
    assert all("shared" not in module.path for module in find_experts(model))
