"""Gates are recognised by what they compute; one that is not known is applied as the module does."""

from __future__ import annotations

import importlib
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from cpu_kernels.expert_mlp import activation_code
from formats.bundle import BundleLayout
from offload.moe.gate import apply_gate, recognise_gate
from tests.moe.rig import KINDS, Experts, UngatedExperts, gpt_oss_gate, softcapped_gate
from tests.tiny_models import ARCHITECTURES, tiny_config

# What each name means, in float64, from its definition.
ACTIVATIONS = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_gates_of_tiny_models(model_type: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    modules = [module for module in model.modules() if hasattr(module, "is_concatenated")]
    assert modules
    for module in modules:
        assert recognise_gate(module, has_gate=True) == ("gpt_oss" if model_type == "gpt_oss" else "silu")


SIZES = {"num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "hidden_size": 8, "intermediate_size": 6}
SIZES |= {"moe_intermediate_size": 6, "moe_hidden_size": 8}
CONFIG = {**SIZES, "hidden_act": "silu", "mlp_hidden_act": "relu2", "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
CONFIG |= {"moe_latent_size": None, "mlp_bias": False}


def experts_of(family: str, cls: str, *arguments: Any, **changed: Any) -> torch.nn.Module:
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        kind = getattr(module, cls)
    except (ImportError, AttributeError):
        pytest.skip(f"this transformers has no {cls}")
    built = kind(types.SimpleNamespace(**{**CONFIG, **changed}), *arguments)
    assert isinstance(built, torch.nn.Module)
    return built


@pytest.mark.parametrize(
    ("family", "cls", "changed", "expected"),
    [
        ("gpt_oss", "GptOssExperts", {}, "gpt_oss"),
        ("gpt_oss", "GptOssExperts", {"swiglu_limit": 6.5}, None),
        ("gpt_oss", "GptOssExperts", {"swiglu_alpha": 1.7}, None),
        ("openai_privacy_filter", "OpenAIPrivacyFilterExperts", {}, "gpt_oss"),
        ("minimax_m3_vl", "MiniMaxM3VLExperts", {}, "gpt_oss"),
        ("hy_v4", "HYV4Experts", {}, None),
        ("glm5_next", "Glm5NextTextExperts", {}, None),
        ("beam", "BeamExperts", {}, "silu"),
        ("deepseek_v4", "DeepseekV4Experts", {}, None),
        ("deepseek_v4", "DeepseekV4Experts", {"swiglu_limit": 100.0}, None),
        ("deepseek_v4", "DeepseekV4Experts", {"swiglu_limit": float("inf")}, "silu"),
        ("deepseek_v4", "DeepseekV4Experts", {"swiglu_limit": float("inf"), "hidden_act": "quick_gelu"}, None),
    ],
)
def test_the_gates_of_other_families(family: str, cls: str, changed: dict[str, Any], expected: str | None) -> None:
    assert recognise_gate(experts_of(family, cls, **changed), has_gate=True) == expected


def test_experts_without_a_gate() -> None:
    module = experts_of("nemotron_h", "NemotronHExperts")
    assert recognise_gate(module, has_gate=False) == "relu2"


@pytest.mark.parametrize("name", sorted(ACT2FN))
@pytest.mark.parametrize("has_gate", [True, False])
def test_what_is_recognised_is_what_is_computed(name: str, has_gate: bool) -> None:
    try:
        act = ACT2FN[name]
    except ImportError:
        pytest.skip("needs a library that is not here")
    module: torch.nn.Module = Experts(lambda g, u: act(g) * u) if has_gate else UngatedExperts(act)
    found = recognise_gate(module, has_gate=has_gate)
    if found is None:
        assert name not in ("silu", "swish", "gelu", "relu", "gelu_pytorch_tanh")
        return
    activation_code(found, BundleLayout(8, 8, "fp32", has_gate=has_gate))
    x = torch.linspace(-40, 40, 4001)
    expected = ACTIVATIONS[found](x.double()).nan_to_num()
    assert torch.allclose(act(x).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [0.5, 7.0, 29.0, 31.0, 99.0, 5000.0])
def test_a_gate_that_is_clamped_anywhere_is_not_the_plain_one(limit: float) -> None:
    clamped = [
        lambda g, u: F.silu(g.clamp(max=limit)) * u,
        lambda g, u: F.silu(g) * u.clamp(max=limit),
        lambda g, u: F.silu(g) * u.clamp(min=-limit),
        lambda g, u: F.silu(g).clamp(max=limit) * u,
    ]
    for gate in clamped:
        assert recognise_gate(Experts(gate), has_gate=True) is None
    assert recognise_gate(UngatedExperts(lambda x: F.relu(x).clamp(max=limit)), has_gate=False) is None


@pytest.mark.parametrize("wrong", [lambda g, u: F.silu(u) * g, lambda g, u: F.silu(g), lambda g, u: F.silu(g) + u])
def test_gate_and_up_are_not_confused(wrong: Any) -> None:
    assert recognise_gate(Experts(wrong), has_gate=True) is None


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_kinds_of_these_tests(kind: str) -> None:
    assert recognise_gate(KINDS[kind].module(), has_gate=KINDS[kind].has_gate) == KINDS[kind].activation


def test_the_defaults_that_a_user_sets_do_not_matter() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert recognise_gate(Experts(gpt_oss_gate, concatenated=False), has_gate=True) == "gpt_oss"
            assert recognise_gate(UngatedExperts(F.silu), has_gate=False) == "silu"
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("concatenated", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_the_modules_own_gate_gets_the_layout_that_it_expects(concatenated: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, rows, 7, generator=generator)
    module = Experts(softcapped_gate, concatenated=concatenated)
    found = apply_gate(module, torch.cat([gate, up], dim=-1), has_gate=True)
    assert torch.equal(found, softcapped_gate(gate, up))
    assert torch.equal(apply_gate(UngatedExperts(F.silu), gate, has_gate=False), F.silu(gate))
