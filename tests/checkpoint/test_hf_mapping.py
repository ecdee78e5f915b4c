import pytest
from transformers import core_model_loading

from offload.checkpoint import hf_mapping
from offload.checkpoint.checkpoint import Checkpoint
from tests.tiny_models import ARCHITECTURES


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_keys_of_siblings_go_where_matching_sends_them(save_tiny, monkeypatch, model_type):
    saved = save_tiny(model_type)
    with Checkpoint.open(saved.directory) as checkpoint:
        keys = list(checkpoint.tensors)
    shortened = hf_mapping.map_keys(saved.skeleton(), keys)
    monkeypatch.setattr(hf_mapping._Siblings, "find", lambda self, key: None)
    assert shortened == hf_mapping.map_keys(saved.skeleton(), keys)


def test_two_experts_of_a_layer_and_matrix_are_matched(save_tiny, monkeypatch):
    saved = save_tiny("qwen3_moe")
    with Checkpoint.open(saved.directory) as checkpoint:
        keys = list(checkpoint.tensors)
    matched = []
    original = core_model_loading.rename_source_key

    def counting(key, *args, **kwargs):
        matched.append(key)
        return original(key, *args, **kwargs)

    monkeypatch.setattr(core_model_loading, "rename_source_key", counting)
    hf_mapping.map_keys(saved.skeleton(), keys)
    ids = {key.split(".experts.")[1].split(".")[0] for key in matched if ".experts." in key}
    assert ids == {"0", "1"}


def test_a_layer_that_goes_elsewhere_is_not_taken_for_a_sibling():
    siblings = hf_mapping._Siblings()

    def mapped(layer, expert):
        return hf_mapping.MappedKey(
            f"layers.{layer}.experts.{expert}.up.weight", f"layers.{layer}.up", True, "experts.*.up", None, expert
        )

    siblings.add(mapped(0, 0))
    siblings.add(mapped(0, 1))
    assert siblings.find("layers.0.experts.5.up.weight") == mapped(0, 5)
    assert siblings.find("layers.1.experts.5.up.weight") is None
    assert siblings.find("layers.0.experts.5.down.weight") is None
    assert siblings.find("layers.0.experts.five.up.weight") is None
    siblings.add(mapped(2, 0))
    assert siblings.find("layers.2.experts.1.up.weight") is None
