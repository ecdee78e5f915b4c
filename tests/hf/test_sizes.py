import pytest
import torch
from transformers import AutoConfig

from offload.hf import sizes
from offload.hf.experts_interface import experts_modules, use_offload_experts
from offload.hf.layer_kinds import alike_layers, one_of_each_kind
from offload.hf.sizes import measure_on_meta
from offload.hf.skeleton import make_skeleton
from tests.tiny_models import ARCHITECTURES, tiny_config


def deeper(model_type):
    """A tiny config with twice the layers, so that kinds repeat."""
    values = tiny_config(model_type).to_dict()
    doubled = 2 * values["num_hidden_layers"]
    for name, value in values.items():
        if isinstance(value, list) and len(value) == values["num_hidden_layers"]:
            values[name] = value * 2
    values["num_hidden_layers"] = doubled
    return AutoConfig.for_model(**values)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("config_of", [tiny_config, deeper], ids=["tiny", "deeper"])
def test_layers_that_are_alike_take_what_each_of_them_takes(monkeypatch, model_type, config_of):
    skeleton = make_skeleton(config_of(model_type), torch.bfloat16)
    use_offload_experts(skeleton)
    found = measure_on_meta(skeleton)
    monkeypatch.setattr(sizes, "alike_layers", lambda skeleton: {})
    assert found == measure_on_meta(skeleton)
    assert found.top_k.keys() == {name for name, _ in experts_modules(skeleton)}
    assert found.kv_nbytes_per_token > 0


def test_kinds_of_layers():
    # Dense first, then experts: DeepSeek's way.
    skeleton = make_skeleton(deeper("deepseek_v3"), torch.bfloat16)
    alike = alike_layers(skeleton)
    names = sorted(name for group in alike.values() for name in group)
    assert names == [f"model.layers.{index}" for index in range(skeleton.config.num_hidden_layers)]
    assert 1 < len(alike) < len(names)
    for first, group in alike.items():
        assert len({type(skeleton.get_submodule(name).mlp) for name in group}) == 1
        assert first == group[0]


def test_layers_that_differ_in_a_setting_are_not_alike():
    skeleton = make_skeleton(tiny_config("qwen3_moe"), torch.bfloat16)
    (group,) = alike_layers(skeleton).values()
    skeleton.get_submodule(group[1]).self_attn.scaling *= 2
    assert len(alike_layers(skeleton)) == 2


def test_layers_are_as_before_afterwards():
    skeleton = make_skeleton(tiny_config("qwen3_moe"), torch.bfloat16)
    alike = alike_layers(skeleton)
    with pytest.raises(KeyError, match="no"), one_of_each_kind(skeleton, alike):
        raise KeyError("no")
    assert not any("forward" in vars(module) for module in skeleton.modules())


def test_a_decoder_that_is_not_found_runs_in_full():
    skeleton = make_skeleton(tiny_config("qwen3_moe"), torch.bfloat16)
    expected = measure_on_meta(skeleton)
    skeleton.config.num_hidden_layers += 1
    assert alike_layers(skeleton) == {}
    skeleton.config.num_hidden_layers -= 1
    assert measure_on_meta(skeleton) == expected
