"""Experts on the GPU (or in the interpreter) against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from formats.bundle import EXPERT_FORMATS, BundleLayout
from gpu_kernels import expert_mlp as module
from gpu_kernels.configs import product_configs
from gpu_kernels.expert_mlp import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS, expert_down, expert_mlp, expert_up
from gpu_kernels.expert_mlp_reference import expert_mlp_reference, expert_up_reference
from gpu_kernels.grouping import group_pairs
from tests.assertions import assert_close
from tests.gpu_kernels.bundles import Slots, activations_of, fill_slots, tolerance_format

# 72 rows are four tiles of 16 and a half; 136 columns are two blocks of 64 and 8, and more than one scale of fp8.
EDGES = {"hidden": 136, "intermediate": 72}


def routing(tokens: int, experts: int, top_k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])


def inputs(tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def assert_experts(
    slots: Slots, x: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, activation: str, *, rounded: bool
) -> None:
    """Fail unless rows [S, T k, H] are those of every pair whose expert has a slot."""
    summed = rows.sum(0).cpu()
    top_k = ids.shape[1]
    for expert, bundle in enumerate(slots.bundles):
        pairs = (ids.cpu().view(-1) == expert).nonzero()[:, 0]
        if len(pairs) and slots.table[expert]:
            expected = expert_mlp_reference(bundle, slots.layout, x.cpu()[pairs // top_k], activation, rounded=rounded)
            assert_close(summed[pairs], expected, tolerance_format(x.dtype))


CASES = [(format, dtype) for format in EXPERT_FORMATS for dtype in activations_of(format)]


@pytest.mark.parametrize(("format", "dtype"), CASES, ids=str)
def test_few_tokens(format: str, dtype: torch.dtype, device: torch.device) -> None:
    layout = BundleLayout(**EDGES, format=format)
    slots = fill_slots(layout, 4, device, absent=(2,))
    x, ids = inputs(2, layout.hidden, dtype).to(device), torch.tensor([[3, 2], [0, 3]], device=device)
    rows = expert_mlp(x, ids, slots.table, layout, "silu")
    assert rows.dtype is torch.float32
    assert_experts(slots, x, ids, rows, "silu", rounded=False)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4", "mxfp4", "fp8_e4m3"])
@pytest.mark.parametrize("tokens", [*range(1, 10), 16])
def test_every_number_of_few_tokens(format: str, tokens: int, device: torch.device) -> None:
    """All of them go to expert 1, so it has one tile or two; expert 3 has no tokens, and 0 no slot."""
    layout = BundleLayout(hidden=72, intermediate=40, format=format)
    slots = fill_slots(layout, 4, device, absent=(0,))
    ids = torch.stack([torch.ones(tokens, dtype=torch.int64), 2 * torch.arange(tokens) % 4], 1).contiguous().to(device)
    assert ids.numel() <= module.FEW_PAIRS
    x = inputs(tokens, layout.hidden, torch.bfloat16).to(device)
    assert_experts(slots, x, ids, expert_mlp(x, ids, slots.table, layout, "silu"), "silu", rounded=False)


@pytest.mark.parametrize(("format", "dtype"), CASES, ids=str)
def test_many_tokens(format: str, dtype: torch.dtype, device: torch.device) -> None:
    layout = BundleLayout(**EDGES, format=format)
    slots = fill_slots(layout, 3, device)
    x, ids = inputs(65, layout.hidden, dtype).to(device), routing(65, 3, 2, seed=2).to(device)
    assert ids.numel() > module.FEW_PAIRS
    rounded = module.default_config(x, ids, layout).scale_weights
    assert_experts(slots, x, ids, expert_mlp(x, ids, slots.table, layout, "silu"), "silu", rounded=rounded)


@pytest.mark.parametrize(
    ("format", "has_gate", "activation"), [("mxfp4", True, "gpt_oss"), ("bf16", True, "gelu"), ("int8", False, "relu2")]
)
def test_many_tokens_with_biases(format: str, has_gate: bool, activation: str, device: torch.device) -> None:
    layout = BundleLayout(hidden=72, intermediate=40, format=format, has_gate=has_gate, has_bias=True)
    slots = fill_slots(layout, 3, device, absent=(1,))
    x, ids = inputs(65, layout.hidden, torch.bfloat16).to(device), routing(65, 3, 2, seed=3).to(device)
    assert_experts(slots, x, ids, expert_mlp(x, ids, slots.table, layout, activation), activation, rounded=True)


@pytest.mark.parametrize("format", ["bf16", "int8", "mxfp4"])
@pytest.mark.parametrize("splits", [2, 4])
def test_splits_give_the_same_sums(
    format: str, splits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 parts of 5 steps and fewer: some are empty."""
    monkeypatch.setattr(module, "splits_of", lambda *_: splits)
    layout = BundleLayout(hidden=136, intermediate=40, format=format, has_bias=True)
    slots = fill_slots(layout, 2, device)
    x, ids = inputs(1, layout.hidden, torch.bfloat16).to(device), torch.tensor([[1, 0]], device=device)
    rows = expert_mlp(x, ids, slots.table, layout, "gelu")
    assert rows.shape == (splits, 2, layout.hidden)
    assert_experts(slots, x, ids, rows, "gelu", rounded=False)


GATES = [(True, name) for name in GATED_ACTIVATIONS] + [(False, name) for name in PLAIN_ACTIVATIONS]


@pytest.mark.parametrize(
    ("has_gate", "activation", "format"), [*((*gate, "fp32") for gate in GATES), (True, "gpt_oss", "mxfp4")]
)
def test_gates_and_biases(has_gate: bool, activation: str, format: str, device: torch.device) -> None:
    layout = BundleLayout(hidden=24, intermediate=40, format=format, has_gate=has_gate, has_bias=True)
    slots = fill_slots(layout, 2, device)
    # Large inputs reach the limits of gpt_oss.
    x, ids = (8 * inputs(2, layout.hidden, torch.float32)).to(device), torch.tensor([[0], [1]], device=device)
    assert_experts(slots, x, ids, expert_mlp(x, ids, slots.table, layout, activation), activation, rounded=False)


def test_splits_of_every_gate(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "splits_of", lambda *_: 2)
    for has_gate, activation in GATES:
        layout = BundleLayout(hidden=70, intermediate=20, format="fp32", has_gate=has_gate, has_bias=True)
        slots = fill_slots(layout, 1, device)
        x, ids = inputs(1, layout.hidden, torch.float32).to(device), torch.tensor([[0]], device=device)
        assert_experts(slots, x, ids, expert_mlp(x, ids, slots.table, layout, activation), activation, rounded=False)


@pytest.mark.configs
@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
@pytest.mark.parametrize("format", EXPERT_FORMATS)
def test_every_config(format: str, few: bool, device: torch.device) -> None:
    layout = BundleLayout(hidden=72, intermediate=40, format=format)
    slots = fill_slots(layout, 2, device)
    ids = torch.zeros(19, 1, dtype=torch.int64, device=device)
    for dtype in activations_of(format):
        x = inputs(19, layout.hidden, dtype).to(device)
        for config in product_configs(format, x.element_size(), few=few):
            rows = expert_mlp(x, ids, slots.table, layout, "silu", config)
            assert_experts(slots, x, ids, rows, "silu", rounded=config.scale_weights)


def test_one_tile_holds_pairs_of_one_expert_only(device: torch.device) -> None:
    """17 tokens of one expert need two tiles of 16; the other expert's begin anew."""
    layout = BundleLayout(hidden=16, intermediate=16, format="fp32")
    slots = fill_slots(layout, 2, device)
    x = inputs(20, 16, torch.float32).to(device)
    ids = torch.tensor([[0]] * 17 + [[1]] * 3, device=device)
    assert_experts(slots, x, ids, expert_mlp(x, ids, slots.table, layout, "relu"), "relu", rounded=False)


@pytest.mark.parametrize("has_gate", [True, False])
def test_halves_around_a_gate_of_the_models_own(has_gate: bool, device: torch.device) -> None:
    layout = BundleLayout(**EDGES, format="int8", has_gate=has_gate)
    slots = fill_slots(layout, 3, device)
    x, ids = inputs(2, layout.hidden, torch.bfloat16).to(device), routing(2, 3, 2, seed=5).to(device)
    config = product_configs("int8", 2, few=True)[0]
    groups = group_pairs(ids, slots.table, config.tokens)
    projected = expert_up(x, groups, slots.table, layout, config).cpu()
    for pair, expert in enumerate(ids.cpu().view(-1).tolist()):
        expected = expert_up_reference(slots.bundles[expert], layout, x.cpu()[pair // 2][None], rounded=False)
        assert_close(projected[pair][None], expected, "bf16")
    gate, up = projected.chunk(2, -1) if has_gate else (None, projected)
    h = (up.relu() if gate is None else gate.relu() * up).bfloat16().to(device)
    rows = expert_down(h, groups, slots.table, layout, config)
    assert_experts(slots, x, ids, rows, "relu", rounded=False)


def test_rows_of_absent_experts_are_left_alone(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = BundleLayout(hidden=16, intermediate=16, format="fp32")
    slots = fill_slots(layout, 2, device, absent=(1,))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(-7))
    ids = torch.tensor([[0, 1], [5, 0]], device=device)
    rows = expert_mlp(inputs(2, 16, torch.float32).to(device), ids, slots.table, layout, "silu")
    assert (rows[:, 1:3] == -7).all()
    assert (rows[:, 0] != -7).any()


def test_no_tokens(device: torch.device) -> None:
    layout = BundleLayout(hidden=16, intermediate=16, format="int4")
    slots = fill_slots(layout, 1, device)
    x = torch.empty(0, 16, device=device)
    rows = expert_mlp(x, torch.empty(0, 2, dtype=torch.int64, device=device), slots.table, layout, "silu")
    assert rows.shape[1:] == (0, 16)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    layout = BundleLayout(hidden=16, intermediate=16, format="bf16")
    table = torch.ones(2, dtype=torch.int64, device=device)
    ids = torch.zeros(3, 1, dtype=torch.int64, device=device)
    x = torch.zeros(3, 16, dtype=torch.bfloat16, device=device)
    for wrong in (x.float(), x[:, :8].contiguous(), x.repeat(1, 2)[:, ::2]):
        with pytest.raises(ValueError, match="experts of bf16 take"):
            expert_mlp(wrong, ids, table, layout, "silu")
    with pytest.raises(ValueError, match="ids: expected 3 rows"):
        expert_mlp(x, ids[:2], table, layout, "silu")
    with pytest.raises(ValueError, match="relu2"):
        expert_mlp(x, ids, table, layout, "relu2")
    with pytest.raises(ValueError, match="must be on"):
        expert_mlp(x, ids, table.to("meta"), layout, "silu")
    huge = dataclasses.replace(layout, intermediate=1 << 26)
    with pytest.raises(ValueError, match="kernels address at most"):
        expert_mlp(x, ids, table, huge, "silu")
    with pytest.raises(ValueError, match="bf16, fp16 and fp32"):
        expert_mlp(x.double(), ids, table, dataclasses.replace(layout, format="int8"), "silu")
