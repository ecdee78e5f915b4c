"""Checkpoints that are quantised already: what is loaded of them, with and without packing, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    Mxfp4Config,
    PretrainedConfig,
    PreTrainedModel,
)

import offload
from formats.bundle import MATRICES, BundleLayout
from formats.pack import unpack_matrix
from offload.errors import CheckpointError, UnsupportedModelError
from offload.hf.config_spec import spec_of_config
from offload.hf.quantised_linear import QuantisedLinear
from offload.quantisation import Quantisation
from tests.checkpoint.test_experts import reference_expert
from tests.hf.reference import assert_logits_close, greedy, logits, prompt, reference_model
from tests.quantised_checkpoints import (
    MXFP4_CONFIG,
    Tensors,
    config_of,
    decoded,
    fp8_config,
    fp8_tensors,
    mxfp4_tensors,
    unquantised,
    write,
)

Checkpoint = Callable[[str], Path]

# Sizes that are multiples of a group, not of the packed layout's 64 columns; rows that are not whole tiles.
ODD_GROUPS = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 24}
# Whole blocks, so that transformers' reading of a scale grid and the config's blocks agree.
WHOLE_BLOCKS = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 384, "moe_intermediate_size": 128}
# Blocks that the matrices' edges cut; their last ones have 24 to 88 rows or columns.
CUT_BLOCKS = {"hidden_size": 152, "head_dim": 44, "intermediate_size": 280, "moe_intermediate_size": 168}
DEEPSEEK = {"hidden_size": 152, "intermediate_size": 280, "moe_intermediate_size": 168, "kv_lora_rank": 136}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """`checkpoint(kind)` → directory, with the checkpoint without quantisation beside it in `plain`."""
    known: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in known:
            directory = tmp_path_factory.mktemp(kind)
            if kind == "mxfp4":
                config = config_of("gpt_oss", **ODD_GROUPS)
                tensors, quantisation = mxfp4_tensors(unquantised(config)), MXFP4_CONFIG
            else:
                family, sizes = {
                    "fp8": ("qwen3_moe", WHOLE_BLOCKS),
                    "fp8_cut": ("qwen3_moe", CUT_BLOCKS),
                    "fp8_deepseek": ("deepseek_v3", DEEPSEEK),
                }[kind]
                config = config_of(family, **sizes)
                scale = torch.bfloat16 if kind == "fp8" else torch.float32
                tensors, quantisation = fp8_tensors(hub_tensors(config), scale_dtype=scale), fp8_config()
            write(directory, config, tensors, quantisation)
            write(directory / "plain", config, decoded(tensors, dtype=torch.float32), None)
            known[kind] = directory
        return known[kind]

    return make


def hub_tensors(config: Any) -> Tensors:
    """With a tensor for each expert and projection, as DeepSeek and Qwen have them."""
    tensors = {}
    for key, tensor in unquantised(config).items():
        if key.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                for name, part in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                    tensors[key.replace("gate_up_proj", f"{expert}.{name}.weight")] = part.clone()
        elif key.endswith("experts.down_proj"):
            for expert, part in enumerate(tensor):
                tensors[key.replace("down_proj", f"{expert}.down_proj.weight")] = part.clone()
        else:
            tensors[key] = tensor
    return tensors


def dequantised_by_transformers(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    method = json.loads((directory / "config.json").read_text())["quantization_config"]["quant_method"]
    how = Mxfp4Config(dequantize=True) if method == "mxfp4" else FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, experts_implementation="eager", quantization_config=how
    )
    if method == "fp8":
        # What is not quantised stays in the dtype in which it is stored.
        model = model.to(dtype)
    return model.eval()  # type: ignore[no-any-return]


def stored_expert(model: Any, layer: int, expert: int) -> tuple[BundleLayout, dict[str, np.ndarray[Any, Any]]]:
    """Components of one expert as they lie in the store."""
    runtime = model.offload
    layout = runtime.spec.experts[layer].layout
    location = runtime.store.location(layer, expert)
    path = runtime.store.shard_paths[location.shard]
    bundle = np.fromfile(path, np.uint8, layout.nbytes, offset=location.offset)
    return layout, {name: bundle[c.offset : c.offset + c.nbytes] for name, c in layout.components.items()}


def experts_of(reference: PreTrainedModel, model: Any) -> list[tuple[int, int, dict[str, torch.Tensor]]]:
    """Layer, expert and its parameters, of all experts."""
    layers = [reference.get_submodule(experts.module) for experts in model.offload.spec.experts]
    return [
        (layer, expert, reference_expert(module, expert))
        for layer, module in enumerate(layers)
        for expert in range(len(module.down_proj))
    ]


def check_unpacked(directory: Path, reference: PreTrainedModel, store_root: Path, dtype: torch.dtype) -> None:
    """Every weight has the reference's bits."""
    model = offload.load(directory, ram="1GiB", nvme=store_root, context=40, dtype=dtype)
    with model.offload:
        for layer, expert, parts in experts_of(reference, model):
            _, stored = stored_expert(model, layer, expert)
            assert set(parts) == set(stored)
            for name, part in parts.items():
                assert part.dtype is dtype
                expected = part.detach().contiguous().view(torch.uint8).numpy().reshape(-1)
                assert np.array_equal(stored[name], expected), f"{name} of expert {expert}, layer {layer}"
        dense = dict(model.named_parameters())
        assert len(dense) > 10
        for name, parameter in dense.items():
            assert torch.equal(parameter, reference.get_parameter(name)), name
            assert parameter.dtype is reference.get_parameter(name).dtype, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_weights_are_those_that_transformers_dequantises(
    kind: str, dtype: torch.dtype, checkpoint: Checkpoint, store_root: Path
) -> None:
    directory = checkpoint(kind)
    check_unpacked(directory, dequantised_by_transformers(directory, dtype), store_root, dtype)


@pytest.mark.parametrize("kind", ["fp8_cut", "fp8_deepseek"])
def test_blocks_at_the_edges_are_those_of_the_config(kind: str, checkpoint: Checkpoint, store_root: Path) -> None:
    """transformers would divide a matrix evenly by its grid of scales, where the format cuts the last block."""
    directory = checkpoint(kind)
    check_unpacked(directory, reference_model(directory / "plain", torch.bfloat16), store_root, torch.bfloat16)


@pytest.mark.parametrize("kind", ["mxfp4", "fp8", "fp8_cut", "fp8_deepseek"])
def test_greedy_tokens_are_those_of_transformers(kind: str, checkpoint: Checkpoint, store_root: Path) -> None:
    directory = checkpoint(kind)
    if kind in ("mxfp4", "fp8"):
        reference = dequantised_by_transformers(directory, torch.float32)
    else:
        reference = reference_model(directory / "plain", torch.float32)
    expected = greedy(reference, prompt())
    smallest = offload.plan(directory, ram="1GiB", context=40, dtype="float32").minimum_ram_nbytes
    for ram in (smallest, "1GiB"):
        model = offload.load(directory, ram=ram, nvme=store_root, context=40, dtype="float32")
        with model.offload:
            assert torch.equal(greedy(model, prompt()), expected)
            assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize(
    ("kind", "quant"),
    [
        ("mxfp4", {"experts": "mxfp4"}),
        ("fp8", "fp8_e4m3"),
        ("fp8_cut", {"experts": "fp8_e4m3", "dense": "fp8_e4m3"}),
        ("fp8_deepseek", {"experts": "fp8_e4m3", "dense": "fp8_e4m3"}),
    ],
)
def test_packing_in_the_same_format_loses_nothing(
    kind: str, quant: Any, checkpoint: Checkpoint, store_root: Path
) -> None:
    """Values of codes and scales in fp32 are the checkpoint's, bit for bit."""
    directory = checkpoint(kind)
    reference = reference_model(directory / "plain", torch.float32)
    model = offload.load(directory, ram="1GiB", nvme=store_root, context=40, quant=quant, dtype="float32")
    with model.offload:
        for layer, expert, parts in experts_of(reference, model):
            layout, stored = stored_expert(model, layer, expert)
            for name in MATRICES:
                found = unpack_matrix(stored[name], stored[f"{name}_scale"], layout.matrix(name))
                assert np.array_equal(found, parts[name].detach().numpy()), f"{name} of expert {expert}, layer {layer}"
        packed = {name: one for name, one in model.named_modules() if isinstance(one, QuantisedLinear)}
        assert bool(packed) == (kind != "mxfp4")
        for name, linear in packed.items():
            if name == "lm_head":
                continue
            weights = unpack_matrix(linear.codes.numpy(), linear.scales.numpy(), linear.layout)
            assert np.array_equal(weights, reference.get_submodule(name).weight.detach().numpy()), name
        if kind != "mxfp4" and "lm_head" not in packed:
            assert_logits_close(logits(model, prompt()), logits(reference, prompt()))


@pytest.mark.parametrize(("kind", "format"), [("mxfp4", "int8"), ("mxfp4", "fp8_e4m3"), ("fp8_cut", "int4")])
def test_other_formats_are_packed_from_the_checkpoints_values(
    kind: str, format: str, checkpoint: Checkpoint, store_root: Path
) -> None:
    directory = checkpoint(kind)
    stores = []
    for source in (directory, directory / "plain"):
        model = offload.load(source, ram="1GiB", nvme=store_root, context=40, quant={"experts": format})
        with model.offload:
            stores.append([stored_expert(model, layer, 1)[1] for layer in range(len(model.offload.spec.experts))])
    for found, expected in zip(*stores, strict=True):
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("quant", [None, "int4", {"experts": "mxfp4"}])
@pytest.mark.parametrize("kind", ["mxfp4", "fp8_cut"])
def test_plans_have_the_sizes_of_the_unquantised_model(
    kind: str, quant: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """But for what decoding dense layers takes while they load."""
    directory = checkpoint(kind)
    tensors = decoded(load_file(directory / "model.safetensors"))
    plain = write(tmp_path, family(kind), tensors, None)
    options: Any = {"ram": "1GiB", "context": 40, "quant": quant, "dtype": "bfloat16"}
    found, expected = offload.plan(directory, **options), offload.plan(plain, **options)
    assert found.minimum_ram_nbytes >= expected.minimum_ram_nbytes
    same = replace(expected, model=found.model, minimum_ram_nbytes=found.minimum_ram_nbytes)
    assert found == same


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_a_config_without_a_dtype_means_bf16(kind: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Nobody computes in the dtype of codes."""
    directory = copied(checkpoint(kind), tmp_path)
    edit_config(directory, dtype=None)
    assert offload.plan(directory, ram="1GiB", context=40).format == "bf16"


def test_a_model_on_meta_takes_a_quantised_checkpoint(checkpoint: Checkpoint, store_root: Path) -> None:
    directory = checkpoint("mxfp4")
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    expected = greedy(dequantised_by_transformers(directory, torch.float32), prompt())
    model = offload.load(skeleton, checkpoint=directory, ram="1GiB", nvme=store_root, context=40)
    with model.offload:
        assert torch.equal(greedy(model, prompt()), expected)


@pytest.mark.parametrize("kind", ["mxfp4", "fp8_cut"])
def test_a_config_alone_is_planned_as_its_checkpoint_is(kind: str, checkpoint: Checkpoint) -> None:
    directory = checkpoint(kind)
    config = AutoConfig.from_pretrained(directory)
    spec = spec_of_config(config, "x", Quantisation(), dtype=torch.bfloat16, context_tokens=40)
    plain = AutoConfig.from_pretrained(directory / "plain")
    expected = spec_of_config(plain, "x", Quantisation(), dtype=torch.bfloat16, context_tokens=40)
    assert replace(spec, load_scratch_nbytes=0) == replace(expected, load_scratch_nbytes=0)
    assert (spec.load_scratch_nbytes > expected.load_scratch_nbytes) == (kind != "mxfp4")
    assert config.quantization_config, "the caller's config is not changed"
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedModelError, match="gptq"):
        spec_of_config(config, "x", Quantisation(), dtype=torch.bfloat16, context_tokens=40)


def family(kind: str) -> PretrainedConfig:
    return config_of("gpt_oss", **ODD_GROUPS) if kind == "mxfp4" else config_of("qwen3_moe", **CUT_BLOCKS)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "fp8", "weight_block_size": None}, "one scale for each tensor"),
        ({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}, "e5m2"),
    ],
)
def test_other_methods_are_refused_by_name(
    fields: dict[str, Any], named: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    directory = copied(checkpoint("mxfp4"), tmp_path)
    edit_config(directory, quantization_config=fields)
    with pytest.raises(UnsupportedModelError, match=named):
        offload.plan(directory, ram="1GiB")


@pytest.mark.parametrize("block", [[128], [128, 0], "128", [128, 12.5]])
def test_block_sizes_that_are_none_are_refused(block: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = copied(checkpoint("fp8"), tmp_path)
    edit_config(directory, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    with pytest.raises(CheckpointError, match="weight_block_size"):
        offload.plan(directory, ram="1GiB")


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_codes_without_a_word_in_the_config_are_refused(kind: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = copied(checkpoint(kind), tmp_path)
    edit_config(directory, quantization_config=None)
    with pytest.raises(UnsupportedModelError, match="quantization_config"):
        offload.plan(directory, ram="1GiB")


GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
UP = "model.layers.0.mlp.experts.1.up_proj.weight"
QUERY = "model.layers.2.self_attn.q_proj.weight"
DAMAGES: dict[str, tuple[str, str, str, Callable[[Tensors], None]]] = {
    "mxfp4 without scales": ("mxfp4", f"{GATE_UP}_blocks", "found none", lambda t: gone(t, f"{GATE_UP}_scales")),
    "mxfp4 without blocks": ("mxfp4", f"{GATE_UP}_scales", "found none", lambda t: gone(t, f"{GATE_UP}_blocks")),
    "mxfp4 scales of other rows": (
        "mxfp4", f"{GATE_UP}_scales", "6, 319, 3", lambda t: replaced(t, f"{GATE_UP}_scales", lambda s: s[:, :-1]),
    ),
    "mxfp4 scales in floats": (
        "mxfp4", f"{GATE_UP}_scales", "F32", lambda t: replaced(t, f"{GATE_UP}_scales", lambda s: s.float()),
    ),
    "mxfp4 blocks of 8": (
        "mxfp4", f"{GATE_UP}_blocks", "6, 320, 3, 8", lambda t: replaced(t, f"{GATE_UP}_blocks", lambda b: b[..., :8]),
    ),
    "mxfp4 of another width": ("mxfp4", GATE_UP, "64, 320", lambda t: narrowed(t, GATE_UP)),
    "mxfp4 and weights": (
        "mxfp4", GATE_UP, "weights too", lambda t: t.update({GATE_UP: torch.zeros(6, 96, 320, dtype=torch.bfloat16)}),
    ),
    "fp8 without scales": ("fp8", UP, "found none", lambda t: gone(t, f"{UP}_scale_inv")),
    "fp8 dense without scales": ("fp8", QUERY, "found none", lambda t: gone(t, f"{QUERY}_scale_inv")),
    "fp8 without codes": ("fp8", f"{UP}_scale_inv", "found none", lambda t: gone(t, UP)),
    "fp8 of another grid": (
        "fp8", f"{QUERY}_scale_inv", "BF16 .1, 2.", lambda t: replaced(t, f"{QUERY}_scale_inv", lambda s: s[:1]),
    ),
    "fp8 scales as integers": (
        "fp8", f"{UP}_scale_inv", "U8", lambda t: replaced(t, f"{UP}_scale_inv", lambda s: s.to(torch.uint8)),
    ),
    "scales of bf16 weights": ("fp8", UP, "BF16", lambda t: replaced(t, UP, lambda w: w.to(torch.bfloat16))),
    "e5m2 codes": ("fp8", UP, "F8_E5M2", lambda t: replaced(t, UP, lambda w: w.to(torch.float8_e5m2))),
    "fp8 vector": ("fp8", UP, "128", lambda t: replaced(t, UP, lambda w: w[:, 0])),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_end_in_an_error_that_says_where(
    damage: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    kind, tensor, found, break_it = DAMAGES[damage]
    directory = copied(checkpoint(kind), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    break_it(tensors)
    save_file({key: one.contiguous() for key, one in tensors.items()}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=found) as caught:
        offload.plan(directory, ram="1GiB")
    message = str(caught.value)
    assert tensor in message and "model.safetensors" in message
    assert "expected" in message and "Fix: " in message


@pytest.mark.parametrize(("kind", "quant"), [("fp8", "fp8_e4m3"), ("fp8", "int8"), ("mxfp4", "mxfp4")])
def test_weights_that_are_not_finite_are_refused_where_they_are_packed(
    kind: str, quant: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    directory = copied(checkpoint(kind), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    if kind == "fp8":
        tensors[UP].view(torch.uint8)[3, 200] = 0xFF
    else:
        tensors[f"{GATE_UP}_blocks"][1, 3, 2] = 0x22
        tensors[f"{GATE_UP}_scales"][1, 3, 2] = 255
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"expert 1 .*NaN"):
        offload.load(directory, ram="1GiB", nvme=tmp_path / "stores", context=40, quant={"experts": quant})


def copied(directory: Path, to: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(directory / name, to / name)
    return to


def edit_config(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config = {key: value for key, value in (config | fields).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))


def gone(tensors: Tensors, key: str) -> None:
    del tensors[key]


def replaced(tensors: Tensors, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors[key] = change(tensors[key])


def narrowed(tensors: Tensors, name: str) -> None:
    for suffix in ("_blocks", "_scales"):
        tensors[f"{name}{suffix}"] = tensors[f"{name}{suffix}"][:, :, :2]
