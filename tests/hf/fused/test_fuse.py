"""Fusing a whole model: what is recognised, what stays, and that each kind alone changes nothing but rounding."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

import offload
from offload.hf.fused import fuse
from offload.hf.fused.swap import Fused
from offload.request import FUSED_KINDS
from tests.conftest import TinyCheckpoint
from tests.hf.reference import assert_logits_close, greedy, logits, prompt, reference_model
from tests.tiny_models import build_tiny

FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "glm4_moe", "qwen3_next"]


@pytest.mark.parametrize("kind", [kind for kind in FUSED_KINDS if kind != "decoder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_kind_alone_gives_the_tokens_of_the_model(family: str, kind: str) -> None:
    plain, fused = build_tiny(family), build_tiny(family)
    assert fuse(fused.requires_grad_(False), [kind])[kind] > 0
    ids = prompt(batch=2)
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    assert_logits_close(logits(fused, ids), logits(plain, ids))
    assert_logits_close(logits(fused, ids[:, :1]), logits(plain, ids[:, :1]))
    assert torch.equal(greedy(fused, ids), greedy(plain, ids))
    assert torch.equal(greedy(fused, ids, attention_mask=padded), greedy(plain, ids, attention_mask=padded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sequences", [2, 12])
def test_tokens_of_sequences_that_lie_apart_are_multiplied_as_their_copy_is(dtype: torch.dtype, sequences: int) -> None:
    model = build_tiny("qwen3_moe", dtype).requires_grad_(False)
    fuse(model, ["linear"])
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sequences, 5, model.config.hidden_size, generator=generator).to(dtype)
    last = hidden[:, -1:]
    assert not last.is_contiguous()
    assert torch.equal(model.lm_head(last), model.lm_head(last.contiguous()))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        # Three layers with four projections and a router each, the head; four norms each and the last.
        ("qwen3_moe", {"attention": 3, "decoder": 3, "kv_cache": 1, "linear": 16, "rms_norm": 13, "rotary": 3}),
        # LayerNorm is no RMS norm.
        ("phimoe", {"attention": 3, "decoder": 0, "kv_cache": 1, "linear": 13, "rms_norm": 0, "rotary": 3}),
    ],
)
def test_counts_what_it_recognises(family: str, expected: dict[str, int]) -> None:
    found = fuse(build_tiny(family).requires_grad_(False), FUSED_KINDS)
    assert {**found, "linear": 0} == {**expected, "linear": 0}
    assert found["linear"] >= expected["linear"]


def test_names_and_parameters_stay() -> None:
    plain, fused = build_tiny("qwen3_moe"), build_tiny("qwen3_moe")
    parameters = dict(fused.named_parameters())
    fuse(fused, FUSED_KINDS)
    assert list(parameters) == [name for name, _ in plain.named_parameters()]
    assert all(parameter is parameters[name] for name, parameter in fused.named_parameters())
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in plain.named_modules()]
    assert all(isinstance(a, type(b)) for a, b in zip(fused.modules(), plain.modules(), strict=True))
    assert list(fused.state_dict()) == list(plain.state_dict())


def test_copies_and_pickles_are_plain() -> None:
    model = build_tiny("qwen3_moe")
    fuse(model, FUSED_KINDS)
    norm = model.get_submodule("model.norm")
    assert isinstance(norm, Fused)
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(copied) is norm.plain
        assert torch.equal(copied.weight, norm.weight)
        assert copied.weight is not norm.weight


def test_training_goes_the_way_of_the_model() -> None:
    plain, fused = build_tiny("qwen3_moe"), build_tiny("qwen3_moe")
    fuse(fused, FUSED_KINDS)
    ids = prompt(tokens=4)
    for model in (plain, fused):
        model(ids, labels=ids).loss.backward()
    for (name, expected), found in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert expected.grad is not None and found.grad is not None
        assert torch.equal(found.grad, expected.grad), name


def test_another_attention_still_is_the_users_choice() -> None:
    plain, fused = build_tiny("qwen3_moe"), build_tiny("qwen3_moe")
    fuse(fused, FUSED_KINDS)
    for model in (plain, fused):
        model.set_attn_implementation("eager")
    ids = prompt(tokens=6)
    with torch.no_grad():
        expected, found = (model(ids, output_attentions=True).attentions for model in (plain, fused))
    assert len(found) == len(expected) == 3
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_casts_and_hooks_are_seen() -> None:
    model = build_tiny("qwen3_moe", torch.bfloat16).requires_grad_(False)
    fuse(model, FUSED_KINDS)
    head = model.get_output_embeddings()
    seen: list[torch.Size] = []
    head.register_forward_hook(lambda _m, _a, output: seen.append(output.shape))
    ids = prompt(tokens=3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert head(torch.ones(1, 48, dtype=torch.bfloat16)).dtype is torch.float16
    logits(model, ids)
    assert seen == [torch.Size([1, 99]), torch.Size([1, 3, 99])]


def test_switches_reach_the_statistics(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    expected = greedy(reference_model(directory, torch.float32), prompt())
    for fused, kinds in ((False, set()), (["linear"], {"linear"}), (True, set(FUSED_KINDS))):
        with offload.load(directory, ram="1GiB", nvme=store_root, context=40, fused=fused).offload as runtime:
            assert set(runtime.stats().fused) == kinds
    model = offload.load(directory, ram="1GiB", nvme=store_root, context=40)
    # Several tokens a step, and a cache that is cropped.
    assert torch.equal(greedy(model, prompt(), prompt_lookup_num_tokens=3), expected)
    model.offload.close()
