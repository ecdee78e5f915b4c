"""The reference is the model in memory: its own parameters, sliced by the conventions of its own forward."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, conversion_mapping, core_model_loading
from transformers.core_model_loading import Chunk, ConversionOps, MergeModulelist, WeightConverter

from offload.checkpoint.checkpoint import Checkpoint
from offload.checkpoint.experts import map_checkpoint, read_component
from offload.errors import CheckpointError, UnsupportedModelError
from placement.tensors import TensorSpan
from tests.checkpoint.conftest import meta_skeleton
from tests.tiny_models import ARCHITECTURES


def reference_expert(experts, e):
    """gate, up, down and biases of expert e, rows being outputs."""
    transposed = (lambda matrix: matrix.T) if experts.is_transposed else (lambda matrix: matrix)
    parts = {"down": transposed(experts.down_proj[e])}
    if experts.has_gate:
        parts["gate"], parts["up"] = split(experts, transposed(experts.gate_up_proj[e]))
    else:
        parts["up"] = transposed(experts.up_proj[e])
    if experts.has_bias:
        parts["gate_bias"], parts["up_bias"] = split(experts, experts.gate_up_proj_bias[e])
        parts["down_bias"] = experts.down_proj_bias[e]
    return parts


def split(experts, rows):
    return rows.chunk(2) if experts.is_concatenated else (rows[::2], rows[1::2])


def check_against_model(directory, model, skeleton):
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "is_concatenated")}
    with Checkpoint.open(directory) as checkpoint:
        mapped = map_checkpoint(skeleton, checkpoint.tensors)
        assert [experts.module for experts in mapped.experts] == list(modules)
        for experts in mapped.experts:
            module = modules[experts.module]
            assert len(experts.sources) == experts.count == module.down_proj.shape[0]
            for e, sources in enumerate(experts.sources):
                expected = reference_expert(module, e)
                assert set(sources) == set(expected)
                for name, source in sources.items():
                    read = read_component(checkpoint, source)
                    assert read.is_contiguous() and read.dtype == expected[name].dtype
                    assert torch.equal(read, expected[name]), (experts.module, e, name)
        return mapped, checkpoint


@pytest.mark.parametrize("original", [True, False], ids=["hub-format", "transformers-format"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_experts_are_those_of_the_model(save_tiny, model_type, sharded, original):
    saved = save_tiny(model_type, sharded=sharded, original=original)
    mapped, checkpoint = check_against_model(saved.directory, saved.model, saved.skeleton())
    # What is left must be what the rest of the model has, each tensor once.
    state = {
        name: value
        for name, value in saved.model.state_dict().items()
        if not any(name.startswith(f"{experts.module}.") for experts in mapped.experts)
    }
    if saved.model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert mapped.unused == {}
    assert len(mapped.dense) == len(state)
    assert sum(span.nbytes for span in mapped.dense.values()) == sum(value.nbytes for value in state.values())
    in_experts = sum(p.nbytes for e in mapped.experts for p in saved.model.get_submodule(e.module).parameters())
    assert in_experts + sum(span.nbytes for span in mapped.dense.values()) == checkpoint.nbytes


OTHER_LAYOUTS = {
    "no gate": (
        "nemotron_h",
        {
            "layers_block_type": ["moe", "attention", "moe"],
            "n_routed_experts": 5,
            "moe_intermediate_size": 40,
            "moe_shared_expert_intermediate_size": 24,
        },
    ),
    "transposed and concatenated": ("aria_text", {"moe_num_experts": 5, "moe_topk": 2, "moe_num_shared_experts": 1}),
}


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_other_layouts(tmp_path, layout):
    model_type, specific = OTHER_LAYOUTS[layout]
    sizes = {"vocab_size": 99, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **sizes, **heads, **specific)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(tmp_path)
    check_against_model(tmp_path, model, meta_skeleton(config))


@pytest.fixture
def mixtral(save_tiny):
    saved = save_tiny("mixtral")
    with Checkpoint.open(saved.directory) as checkpoint:
        yield saved.skeleton(), dict(checkpoint.tensors)


def w1(expert, layer=1):
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight"


def changed(span, **fields):
    return dataclasses.replace(span, **fields)


def test_keys_without_the_base_prefix(mixtral):
    skeleton, tensors = mixtral
    stripped = {key.removeprefix("model."): span for key, span in tensors.items()}
    assert map_checkpoint(skeleton, stripped).experts == map_checkpoint(skeleton, tensors).experts


def test_layers_that_the_model_lacks_are_unused(mixtral):
    skeleton, tensors = mixtral
    extra = {w1(expert, layer=3): tensors[w1(expert)] for expert in range(6)}
    mapped = map_checkpoint(skeleton, tensors | extra)
    assert set(mapped.unused) == set(extra)
    assert mapped.experts == map_checkpoint(skeleton, tensors).experts


def test_mapping_leaves_the_skeleton_as_it_was(mixtral):
    skeleton, tensors = mixtral
    before = list(skeleton.state_dict())
    assert map_checkpoint(skeleton, tensors) == map_checkpoint(skeleton, tensors)
    assert list(skeleton.state_dict()) == before
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def without(key):
    return lambda tensors: tensors.pop(key)


def with_changed(key, **fields):
    return lambda tensors: tensors.update({key: changed(tensors[key], **fields)})


def with_extra(key, like):
    return lambda tensors: tensors.update({key: tensors[like]})


def without_layer(tensors):
    for expert in range(6):
        del tensors[w1(expert)]


def without_projection(tensors):
    for key in [key for key in tensors if ".layers.1." in key and key.endswith(".w2.weight")]:
        del tensors[key]


def all_of_another_shape(tensors):
    for expert in range(6):
        tensors[w1(expert)] = changed(tensors[w1(expert)], shape=(39, 48))


def all_integers(tensors):
    for key in tensors:
        if ".experts." in key:
            tensors[key] = changed(tensors[key], dtype="I16")


DAMAGED = {
    "missing expert": (without(w1(3)), [w1(3), "6 experts"]),
    "missing last expert": (without(w1(5)), [w1(5)]),
    "missing gates": (without_layer, ["layers.1.mlp.experts.gate_up_proj", "w1.weight"]),
    "missing projection": (without_projection, ["layers.1.mlp.experts.down_proj", "none"]),
    "one expert too many": (with_extra(w1(6), w1(5)), [w1(6), "below 6"]),
    "expert twice": (with_extra(w1("03"), w1(3)), [w1("03"), w1(3)]),
    "expert without number": (with_extra(w1("x"), w1(3)), [w1("x")]),
    "another kind of key": (
        with_extra("model.layers.1.mlp.experts.gate_up_proj", w1(3)),
        ["layers.1.mlp.experts.gate_up_proj", "once"],
    ),
    "stray tensor": (with_extra(w1(3).replace("weight", "extra"), w1(3)), ["w1.extra", "does not have"]),
    "one of another shape": (with_changed(w1(2), shape=(48, 40)), [w1(2), "[40, 48]", "[48, 40]"]),
    "a vector": (with_changed(w1(2), shape=(1920,)), [w1(2), "[1920]"]),
    "all of another shape": (all_of_another_shape, [w1(0), "[80, 48]", "[79, 48]"]),
    "gate and up that do not join": (
        lambda tensors: [with_changed(w1(e), shape=(48, 40))(tensors) for e in range(6)],
        [w1(0), "[48, 40]"],
    ),
    "mixed dtypes": (with_changed(w1(2), dtype="F16"), [w1(2), "BF16", "F16"]),
    "mixed dtypes between projections": (
        lambda tensors: [with_changed(w1(e).replace("w1", "w2"), dtype="F16")(tensors) for e in range(6)],
        ["w2.weight", "BF16", "F16"],
    ),
    "integers": (all_integers, [w1(0, layer=0), "I16"]),
    "fp8 without scales": (with_changed(w1(0), dtype="F8_E4M3"), [w1(0), "F8_E4M3"]),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_named(mixtral, damage):
    skeleton, tensors = mixtral
    change, words = DAMAGED[damage]
    change(tensors)
    with pytest.raises(CheckpointError) as caught:
        map_checkpoint(skeleton, tensors)
    for word in [*words, "model.safetensors", "Fix:"]:
        assert word in str(caught.value)


def test_stacked_experts_of_another_count(save_tiny):
    saved = save_tiny("granitemoe")
    with Checkpoint.open(saved.directory) as checkpoint:
        tensors = dict(checkpoint.tensors)
    key = next(key for key in tensors if key.endswith("input_linear.weight"))
    tensors[key] = changed(tensors[key], shape=(3, 160, 48))
    with pytest.raises(CheckpointError, match="6 experts") as caught:
        map_checkpoint(saved.skeleton(), tensors)
    assert key in str(caught.value)


def test_an_empty_checkpoint(mixtral):
    with pytest.raises(CheckpointError, match="0 tensors"):
        map_checkpoint(mixtral[0], {})


QUANTISED = {
    "weight_scale_inv": "FP8",
    "qweight": "GPTQ",
    "weight_packed": "compressed-tensors",
}


@pytest.mark.parametrize("component", QUANTISED)
def test_quantised_tensors_are_refused_by_method(mixtral, component):
    skeleton, tensors = mixtral
    tensors[w1(0).replace("weight", component)] = TensorSpan("model.safetensors", 0, 4, "F32", (1,))
    with pytest.raises(UnsupportedModelError, match=QUANTISED[component]):
        map_checkpoint(skeleton, tensors)


class Rotate(ConversionOps):
    """An operation of a later release."""

    def convert(self, *_arguments, **_more):
        raise AssertionError("conversions are interpreted, never run")


@pytest.mark.parametrize(
    ("operations", "word"),
    [
        ([MergeModulelist(0), Rotate()], "Rotate"),
        ([MergeModulelist(0), Chunk(0)], "Chunk"),
        ([Rotate()], "Rotate"),
        ([MergeModulelist(1)], "dim=1"),
    ],
)
def test_conversion_that_is_not_known(mixtral, monkeypatch, operations, word):
    converter = WeightConverter(".block_sparse_moe.experts.*.w1.weight", ".mlp.experts.gate_up_proj", operations)
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _model: [converter])
    with pytest.raises(UnsupportedModelError, match=word) as caught:
        map_checkpoint(*mixtral)
    assert "gate_up_proj" in str(caught.value)


def test_transformers_without_a_private_name(mixtral, monkeypatch):
    monkeypatch.delattr(core_model_loading, "dot_natural_key")
    with pytest.raises(UnsupportedModelError, match="dot_natural_key"):
        map_checkpoint(*mixtral)
