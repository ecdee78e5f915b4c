"""A decoder's forward in one pass against its own code with the same kernels: the same bits, or it is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from offload.hf.fused import fuse
from offload.hf.fused.causal_pass import CausalPass
from offload.hf.fused.decoder_pass import DecoderPass
from offload.hf.fused.swap import STACK
from offload.request import FUSED_KINDS
from tests.hf.reference import flat, prompt
from tests.tiny_models import build_tiny

FAMILIES = ("mixtral", "qwen3_moe", "glm4_moe", "olmoe", "minimax_m2", "hunyuan_v1_moe")
OTHERS = [kind for kind in FUSED_KINDS if kind != "decoder"]
PROMPT_TOKENS = 17


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each forward of a decoder that could have been one pass, with its output layer or not, whether it was."""
    seen: list[bool] = []
    original, original_causal = DecoderPass.run, CausalPass.run

    def run(self: DecoderPass, args: tuple[Any, ...], passed: dict[str, Any]) -> Any:
        done = original(self, args, passed)
        seen.append(done is not None)
        return done

    def run_causal(self: CausalPass, args: tuple[Any, ...], passed: dict[str, Any]) -> Any:
        done = original_causal(self, args, passed)
        # Otherwise the model's own code asks its decoder.
        seen.extend([True] if done is not None else [])
        return done

    monkeypatch.setattr(DecoderPass, "run", run)
    monkeypatch.setattr(CausalPass, "run", run_causal)
    return seen


def pair(family: str, dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedModel]:
    passing, plain = (build_tiny(family, dtype).requires_grad_(False) for _ in range(2))
    fuse(passing, FUSED_KINDS)
    fuse(plain, OTHERS)
    return passing, plain


def after_a_prompt(model: PreTrainedModel, batch: int = 1) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(prompt(batch, PROMPT_TOKENS), past_key_values=cache)
    return cache


@pytest.mark.parametrize("family", FAMILIES)
def test_has_the_bits_of_the_models_own_code(family: str, passes: list[bool]) -> None:
    passing, plain = pair(family)
    found = []
    for model in (passing, plain):
        cache = after_a_prompt(model, 2)
        outs = []
        for step, token in enumerate(prompt(2, 6, seed=1).T[:, :, None]):
            seen = PROMPT_TOKENS + step + 1
            options: dict[str, torch.Tensor] = {}
            if step % 2:
                options = {"attention_mask": torch.ones(2, seen, dtype=torch.int64)}
            if step % 3 == 2:
                options["position_ids"] = torch.full((2, 1), seen - 1)
            outs.append(model(token, past_key_values=cache, **options).logits)
        found.append(torch.stack(outs))
    assert torch.equal(*found)
    assert passes == [False, *[True] * 6]


def test_generation_is_passes(passes: list[bool]) -> None:
    passing, plain = pair("qwen3_moe")
    found = [model.generate(prompt(), max_new_tokens=8, do_sample=False, pad_token_id=0) for model in (passing, plain)]
    assert torch.equal(*found)
    assert sum(passes) == 7


def test_the_output_is_that_of_the_models_own_code() -> None:
    passing, plain = pair("mixtral")
    outs = []
    for model in (passing, plain):
        cache = after_a_prompt(model)
        out = model.get_decoder()(input_ids=prompt(1, 1), past_key_values=cache)
        assert out.past_key_values is cache
        outs.append(out)
    assert type(outs[0]) is type(outs[1]) and [*outs[0].keys()] == [*outs[1].keys()]
    assert torch.equal(outs[0].last_hidden_state, outs[1].last_hidden_state)
    # The caller's own: the next pass does not write to it.
    kept = outs[0].last_hidden_state.clone()
    passing.get_decoder()(input_ids=prompt(1, 1, seed=5), past_key_values=outs[0].past_key_values)
    assert torch.equal(outs[0].last_hidden_state, kept)


CALLS: dict[str, dict[str, Any]] = {
    "hidden states": {"output_hidden_states": True},
    "router logits": {"output_router_logits": True},
    "a tuple": {"return_dict": False},
    "another position": {"position_ids": torch.tensor([[3]])},
    "padding": {"attention_mask": torch.tensor([[0] + [1] * PROMPT_TOKENS])},
    "a mask of its own": {"attention_mask": torch.zeros(1, 1, 1, PROMPT_TOKENS + 1)},
    "no cache wanted": {"use_cache": False},
}


@pytest.mark.parametrize("asked", CALLS)
def test_what_is_asked_for_beside_goes_the_own_way(asked: str, passes: list[bool]) -> None:
    passing, plain = pair("qwen3_moe")
    found = []
    for model in (passing, plain):
        cache = after_a_prompt(model)
        found.append(flat(model.get_decoder()(input_ids=prompt(1, 1), past_key_values=cache, **CALLS[asked])))
    assert len(found[0]) == len(found[1]) and all(map(torch.equal, *found))
    assert not any(passes)


def hook_on_embedding(model: PreTrainedModel) -> None:
    model.get_decoder().embed_tokens.register_forward_hook(lambda _module, _args, output: output * 2)


def hook_on_angles(model: PreTrainedModel) -> None:
    model.get_decoder().rotary_emb.register_forward_hook(lambda _module, _args, output: (output[1], output[0]))


def other_embedding(model: PreTrainedModel) -> None:
    embedding = model.get_decoder().embed_tokens
    other = nn.Embedding(*embedding.weight.shape, dtype=embedding.weight.dtype).requires_grad_(False)
    other.weight.copy_(embedding.weight.flip(0))
    model.set_input_embeddings(other)


def other_norm(model: PreTrainedModel) -> None:
    model.get_decoder().norm = nn.Identity()


def weight_of_norm(model: PreTrainedModel) -> None:
    model.get_decoder().norm.weight = nn.Parameter(model.get_decoder().norm.weight * 2, requires_grad=False)


def fewer_layers(model: PreTrainedModel) -> None:
    decoder = model.get_decoder()
    decoder.layers = nn.ModuleList([decoder.layers[0], decoder.layers[0], decoder.layers[2]])


def other_layer(model: PreTrainedModel) -> None:
    class Twice(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, **passed: object) -> object:
            return self.layer(x * 2, **passed)

    layers = model.get_decoder().layers
    layers[1] = Twice(layers[1])


def adapter(model: PreTrainedModel) -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> object:
            return self.base(x) + 1

    attention = model.get_decoder().layers[1].self_attn
    attention.v_proj = Adapter(attention.v_proj)


def other_block(model: PreTrainedModel) -> None:
    model.get_decoder().layers[1].mlp = nn.Identity()


CHANGES = (
    hook_on_embedding, hook_on_angles, other_embedding, other_norm, weight_of_norm, fewer_layers, other_layer, adapter,
    other_block,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_user_changes_is_heeded(change: Callable[[PreTrainedModel], None], passes: list[bool]) -> None:
    passing, plain = pair("qwen3_moe")
    found = []
    for model in (passing, plain):
        cache = after_a_prompt(model)
        before = model(prompt(1, 1), past_key_values=cache).logits
        cache.crop(-1)
        change(model)
        after = model(prompt(1, 1), past_key_values=cache).logits
        assert not torch.equal(before, after)
        found.append(after)
    assert torch.equal(*found)
    assert passes == [False, True, False]


def test_a_setting_of_the_config_is_heeded(passes: list[bool]) -> None:
    passing, plain = pair("qwen3_moe")
    for model in (passing, plain):
        model.config.output_hidden_states = True
    outs = [model(prompt(1, 1), past_key_values=after_a_prompt(model)) for model in (passing, plain)]
    assert all(map(torch.equal, outs[0].hidden_states, outs[1].hidden_states))
    assert not any(passes)


def test_a_token_that_is_none_leaves_the_cache_as_it_was() -> None:
    passing, _ = pair("qwen3_moe")
    cache = after_a_prompt(passing)
    with pytest.raises(IndexError):
        passing(torch.tensor([[10**6]]), past_key_values=cache)
    assert cache.get_seq_length() == PROMPT_TOKENS
    assert passing(prompt(1, 1), past_key_values=cache).logits.isfinite().all()


def test_gradients_and_casts_go_the_own_way(passes: list[bool]) -> None:
    passing, plain = pair("qwen3_moe", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [model(prompt(1, 1), past_key_values=after_a_prompt(model)).logits for model in (passing, plain)]
    assert torch.equal(*outs)
    with torch.no_grad():
        caches = [after_a_prompt(model) for model in (passing, plain)]
    passing.get_decoder().embed_tokens.requires_grad_(True)
    assert passing(prompt(1, 1), past_key_values=caches[0]).logits.requires_grad
    assert not any(passes)


@pytest.mark.parametrize("form", ["scaled embedding", "added to the norm", "windows"])
def test_other_forms_are_not_mistaken(form: str) -> None:
    model = build_tiny("mixtral").requires_grad_(False)
    plain = type(model.model).forward
    if form == "windows":
        model.config.sliding_window = 4096
    else:

        class Other(type(model.model)):  # type: ignore[misc]
            def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **passed: Any) -> Any:
                if input_ids is not None and form == "scaled embedding":
                    input_ids, inputs_embeds = None, 2 * self.embed_tokens(input_ids)
                found = plain(self, input_ids=input_ids, inputs_embeds=inputs_embeds, **passed)
                if input_ids is not None and form == "added to the norm":
                    found.last_hidden_state = found.last_hidden_state + 1
                return found

        model.model.__class__ = Other
    assert fuse(model, FUSED_KINDS)["decoder"] == 3
    assert STACK not in model.model.__dict__
