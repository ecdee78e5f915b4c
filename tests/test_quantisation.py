"""Quantised models: what is asked for, what is packed, what comes out, and what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import offload
from formats.pack import pack_matrix, unpack_matrix
from formats.packed import PACKED_FORMATS, MatrixLayout
from offload.errors import CheckpointError, InvalidArgumentError
from offload.hf.quantised_linear import QuantisedLinear
from offload.quantisation import Quantisation, make_quantisation, parse_quantisation
from tests.conftest import TinyCheckpoint
from tests.hf.reference import greedy, logits, prompt, reference_model
from tests.tiny_models import build_tiny, tiny_config

FORMATS = sorted(PACKED_FORMATS)

# Relative RMS of a token's logits from those of the same quantised weights in fp32, in the median. Activations are not
# rounded in fp8_e4m3; elsewhere they are, to int8, which may turn a router that nearly ties: such tokens are far off.
ACTIVATION_ERROR = {"fp8_e4m3": 1e-5, "int8": 0.05, "int4": 0.05, "mxfp4": 0.05}


def dequantised(weights: torch.Tensor, format: str) -> torch.Tensor:
    matrix = np.ascontiguousarray(weights.detach().float().numpy())
    rows, columns = matrix.shape
    return torch.from_numpy(unpack_matrix(*pack_matrix(matrix, format), MatrixLayout(rows, columns, format)))


@torch.no_grad()
def round_weights(model: PreTrainedModel, linears: set[str], linear_format: str, expert_format: str | None) -> None:
    """Give a model the values that its packed weights stand for."""
    for name, module in model.named_modules():
        if name in linears:
            assert isinstance(module, nn.Linear)
            rounded = dequantised(module.weight, linear_format)
            # What shares the weights keeps its own.
            module.weight = nn.Parameter(rounded.to(module.weight.dtype))
        if hasattr(module, "is_concatenated") and expert_format is not None:
            round_experts(module, expert_format)


def round_experts(module: Any, format: str) -> None:
    into = module.gate_up_proj if module.has_gate else module.up_proj
    for expert in range(into.shape[0]):
        for parameter in (into, module.down_proj):
            matrix = parameter[expert].mT if module.is_transposed else parameter[expert]
            if parameter is into and module.has_gate:
                # Gate and up are matrices of their own: groups along the input do not care, blocks of rows do.
                if module.is_concatenated:
                    parts: list[Any] = [slice(0, len(matrix) // 2), slice(len(matrix) // 2, None)]
                else:
                    parts = [slice(0, None, 2), slice(1, None, 2)]
            else:
                parts = [slice(None)]
            for part in parts:
                matrix[part] = dequantised(matrix[part], format)


def quantised_linears(model: PreTrainedModel) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def relative_rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    by_token = (found - expected).square().mean(-1) / expected.square().mean(-1)
    return by_token.sqrt().median().item()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "granitemoe"])
def test_fp8_equals_transformers_with_rounded_weights(
    model_type: str, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    """The format that leaves activations alone shows that every weight is in its place."""
    check_family(tiny_checkpoint(model_type), store_root, "fp8_e4m3")


@pytest.mark.parametrize("format", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_formats_with_int8_activations_are_near(
    format: str, model_type: str, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    check_family(tiny_checkpoint(model_type), store_root, format)


def check_family(directory: Path, store_root: Path, format: str) -> None:
    reference = reference_model(directory, torch.float32)
    everything = dict.fromkeys(("experts", "dense", "lm_head"), format)
    ids = prompt(batch=2)
    seen = []
    minimum = offload.plan(directory, ram="1GiB", context=40, batch=2, quant=everything).minimum_ram_nbytes
    for ram in (minimum, "1GiB"):
        model = offload.load(directory, ram=ram, nvme=store_root, context=40, batch=2, quant=everything)
        with model.offload as runtime:
            names = quantised_linears(model)
            assert runtime.plan.format == runtime.plan.dense_format == runtime.plan.head_format == format
            seen.append(logits(model, ids))
            runtime.check()
    assert torch.equal(*seen), "logits depend on the budget"
    linears = {name for name, module in reference.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name in linears if name.endswith(("q_proj", "o_proj", "lm_head", "down_proj"))} <= names <= linears
    assert not any(name.endswith(("gate", "router")) for name in names)
    round_weights(reference, names, format, format)
    assert relative_rms(seen[0], logits(reference, ids)) <= ACTIVATION_ERROR[format]


def test_routers_and_gates_are_left_alone(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    model = offload.load(tiny_checkpoint("qwen2_moe"), ram="1GiB", nvme=store_root, context=40, quant={"dense": "int8"})
    names = quantised_linears(model)
    model.offload.close()
    attention = {f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qkvo"}
    shared = {f"model.layers.{i}.mlp.shared_expert.{p}_proj" for i in (0, 2) for p in ("gate", "up", "down")}
    dense = {f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")}
    assert names == attention | shared | dense
    assert model.offload.plan.format == "fp32"
    assert model.lm_head.weight.dtype is torch.float32


@pytest.mark.parametrize("tied", [False, True])
def test_a_plan_counts_what_is_there(tied: bool, tmp_path: Path, store_root: Path) -> None:
    config = tiny_config("qwen2_moe")
    config.tie_word_embeddings = tied
    original = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    original.save_pretrained(tmp_path / "model")
    model = offload.load(tmp_path / "model", ram="1GiB", nvme=store_root, context=40, quant="int4", fused=False)
    with model.offload as runtime:
        tensors = [*model.parameters(), *model.buffers()]
        held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
        assert runtime.plan.ram.dense_nbytes == sum(held.values())
        assert (runtime.plan.format, runtime.plan.dense_format, runtime.plan.head_format) == ("int4", "int4", "int8")
        assert runtime.plan.slot_nbytes == runtime.layers[0].layout.nbytes
        assert isinstance(model.lm_head, QuantisedLinear)
        assert model.lm_head.layout.format == "int8"
        embedding = model.get_input_embeddings().weight
        assert torch.equal(embedding, original.get_input_embeddings().weight)
        assert torch.isfinite(logits(model, prompt())).all()


def test_biases_are_kept(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    directory = tiny_checkpoint("gpt_oss", torch.bfloat16)
    model = offload.load(directory, ram="1GiB", nvme=store_root, context=40, quant={"dense": "int8"})
    reference = reference_model(directory, torch.bfloat16)
    found = model.get_submodule("model.layers.0.self_attn.q_proj").bias
    model.offload.close()
    assert found.dtype is torch.float32
    assert torch.equal(found, reference.get_submodule("model.layers.0.self_attn.q_proj").bias.float())


def test_a_model_in_memory_is_quantised_as_its_checkpoint(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    ids = prompt(seed=9)
    found = []
    for model_or_path in (directory, build_tiny("qwen3_moe")):
        model = offload.load(model_or_path, ram="1GiB", nvme=store_root, context=40, quant="int8")
        found.append((greedy(model, ids), logits(model, ids)))
        model.offload.close()
        layers = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
        assert all(layer.codes.data_ptr() % 64 == 0 for layer in layers)
        assert len({layer.codes.untyped_storage().data_ptr() for layer in layers}) == 1, "several slabs"
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_each_format_has_a_store_of_its_own_whatever_the_dtype(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    stores = set()
    for quant, dtype in ((None, "auto"), ("int4", "auto"), ("int4", "bfloat16"), ("int8", "auto")):
        model = offload.load(directory, ram="1GiB", nvme=tmp_path, context=40, quant=quant, dtype=dtype)
        stores.add(model.offload.store.path.name)
        model.offload.close()
    assert sorted(name.rpartition("-")[2] for name in stores) == ["fp32", "int4", "int8"]


@pytest.mark.parametrize("where", ["experts", "dense"])
def test_weights_that_are_not_finite_are_refused_by_name(where: str, tmp_path: Path) -> None:
    model = build_tiny("qwen3_moe")
    with torch.no_grad():
        if where == "experts":
            model.model.layers[1].mlp.experts.down_proj[3, 2, 1] = float("nan")
        else:
            model.model.layers[1].self_attn.k_proj.weight[2, 1] = float("inf")
    model.save_pretrained(tmp_path / "model")
    named = "down of expert 3 of model.layers.1" if where == "experts" else "model.layers.1.self_attn.k_proj"
    with pytest.raises(CheckpointError, match=f"{named}.*finite"):
        offload.load(tmp_path / "model", ram="1GiB", nvme=tmp_path / "stores", context=40, quant={where: "int4"})


def test_one_format_for_all_keeps_the_output_layer_in_8_bits() -> None:
    assert make_quantisation(None) == Quantisation(None, None, None)
    assert make_quantisation("int8") == Quantisation("int8", "int8", "int8")
    assert make_quantisation("int4") == Quantisation("int4", "int4", "int8")
    assert make_quantisation("mxfp4") == Quantisation("mxfp4", "mxfp4", "int8")
    assert make_quantisation({"experts": "int4", "dense": None}) == Quantisation("int4", None, None)


@pytest.mark.parametrize(
    ("quant", "named"),
    [("int3", "int8, int4, mxfp4, fp8_e4m3"), ({"expert": "int4"}, "experts, dense, lm_head"), (4, "expected one of"),
     ({"dense": "q4_0"}, "'dense'"), ({"dense": 4}, "'dense'"), (True, "expected one of")],
)  # fmt: skip
def test_bad_arguments_are_refused_with_what_there_is(tmp_path: Path, quant: Any, named: str) -> None:
    for door in (offload.plan, offload.load):
        with pytest.raises(InvalidArgumentError, match=named):
            door(tmp_path / "nowhere", quant=quant)


def test_what_is_left_open_may_become_the_most_precise_first() -> None:
    assert [*make_quantisation("int8").candidates()] == [make_quantisation("int8")]
    auto = make_quantisation("auto")
    assert auto == Quantisation("auto", "auto", "auto")
    assert auto.is_open
    assert auto.candidates() == [make_quantisation(format) for format in (None, "int8", "int4")]
    assert auto.candidates("mxfp4")[1] == Quantisation("mxfp4", "int8", "int8")
    assert auto.candidates("fp8_e4m3")[1] == Quantisation("fp8_e4m3", "fp8_e4m3", "int8")
    # The output layer is not packed in 4 bits by choice, so there are two ways.
    head = make_quantisation({"experts": "int4", "lm_head": "auto"})
    assert head.candidates() == [Quantisation("int4"), Quantisation("int4", None, "int8")]
    assert make_quantisation(parse_quantisation("experts=auto,dense=int8")).is_open


def test_the_spelling_of_the_command_line() -> None:
    assert parse_quantisation("int4") == "int4"
    assert parse_quantisation("experts=int4,dense=none") == {"experts": "int4", "dense": None}
    for bad in ("experts=int4,dense", "experts=int4,experts=int8"):
        with pytest.raises(InvalidArgumentError, match="quant="):
            parse_quantisation(bad)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_linear_is_its_rounded_weights(format: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(50, 70, generator=generator).to(dtype)
    bias = torch.randn(50, generator=generator).to(dtype)
    x = torch.randn(2, 9, 70, generator=generator).to(dtype)
    layer = QuantisedLinear(weight, bias, format, "here")
    expected = x.double() @ dequantised(weight, format).double().T + bias.double()
    found = layer(x)
    assert (found.dtype, found.shape) == (dtype, (2, 9, 50))
    rounding = 0.01 if dtype is torch.bfloat16 or format != "fp8_e4m3" else 1e-6
    assert relative_rms(found.double(), expected) <= rounding
