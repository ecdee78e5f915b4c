"""One new token under "eager": by the kernel, as far as it computes what the function does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from offload.hf.fused import fuse, other_attention
from offload.request import FUSED_KINDS
from tests.hf.reference import prompt
from tests.tiny_models import build_tiny


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of the kernel, whether it had sinks."""
    found: list[bool] = []
    kernel = other_attention.decode_attention

    def counted(*args: Any) -> torch.Tensor:
        found.append(args[5] is not None)
        return kernel(*args)

    monkeypatch.setattr(other_attention, "decode_attention", counted)
    return found


def _pair(family: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    plain, fused = (build_tiny(family, dtype).requires_grad_(False) for _ in range(2))
    fuse(fused, FUSED_KINDS)
    for model in (plain, fused):
        model.set_attn_implementation("eager")
    return plain, fused


def _decoded(model: PreTrainedModel, ids: torch.Tensor, steps: int, **passed: Any) -> torch.Tensor:
    """Logits of a prompt's last token and of `steps` more, the same ones for every model."""
    cache, logits = DynamicCache(config=model.config), []
    mask = passed.pop("attention_mask", None)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps + 1):
        with torch.no_grad():
            out = model(ids, past_key_values=cache, attention_mask=mask, use_cache=True, **passed)
        logits.append(out.logits[:, -1])
        ids = torch.randint(99, (len(ids), 1), generator=generator)
        mask = None if mask is None else torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
    return torch.stack(logits)


@pytest.mark.parametrize(("family", "has_sinks"), [("gpt_oss", True), ("qwen3_moe", False)])
def test_decoding_equals_the_models_own(family: str, has_sinks: bool, calls: list[bool]) -> None:
    plain, fused = _pair(family)
    # Beyond the window of layers that have one.
    expected, found = (_decoded(model, prompt(tokens=5, batch=2), 24) for model in (plain, fused))
    assert torch.allclose(found, expected, atol=2e-5)
    assert calls == [has_sinks] * 24 * plain.config.num_hidden_layers


def test_bf16_is_as_near_to_fp32_as_the_models_own(calls: list[bool]) -> None:
    plain, fused = _pair("gpt_oss", torch.bfloat16)
    exact = build_tiny("gpt_oss").requires_grad_(False)
    exact.load_state_dict({name: value.float() for name, value in plain.state_dict().items()})
    exact.set_attn_implementation("eager")
    wanted, own, found = (_decoded(model, prompt(tokens=5), 12).float() for model in (exact, plain, fused))
    assert calls
    assert (found - wanted).abs().mean() <= 1.2 * (own - wanted).abs().mean()


def test_hidden_tokens_and_wanted_weights_are_left_to_the_function(calls: list[bool]) -> None:
    plain, fused = _pair("gpt_oss")
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, :3] = 0
    ids = prompt(tokens=6, batch=2)
    expected, found = (_decoded(model, ids, 3, attention_mask=mask) for model in (plain, fused))
    assert torch.allclose(found, expected, atol=2e-5)
    for change in _asking_for_weights():
        weights = []
        for model in (plain, fused):
            cache = DynamicCache(config=model.config)
            passed = change(model)
            with torch.no_grad():
                model(prompt(tokens=4), past_key_values=cache, use_cache=True)
                weights.append(model(prompt(tokens=1), past_key_values=cache, use_cache=True, **passed).attentions)
        for a, b in zip(*weights, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert not calls


def _asking_for_weights() -> list[Callable[[PreTrainedModel], dict[str, Any]]]:
    def by_config(model: PreTrainedModel) -> dict[str, Any]:
        model.config.output_attentions = True
        return {}

    return [lambda _: {"output_attentions": True}, by_config]


def test_what_is_no_softmax_attention_stays(calls: list[bool]) -> None:
    def halved(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any,
               **__: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
        return (query @ key.mT @ value / 2).transpose(1, 2), None

    query = torch.ones(1, 2, 1, 8)
    states = torch.ones(1, 2, 3, 8)
    attend = other_attention.with_kernel(halved)
    out, _ = attend(torch.nn.Identity(), query, states, states, None)
    assert torch.equal(out, torch.full((1, 1, 2, 8), 12.0)) and not calls
