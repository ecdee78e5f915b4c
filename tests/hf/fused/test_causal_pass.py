"""A model's whole forward in one pass against its own code with the same kernels: the same bits, or left alone."""

from __future__ import annotations

import copy
import inspect
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from offload.hf.fused import fuse
from offload.hf.fused.causal_pass import CausalForward, CausalPass
from offload.hf.fused.kv_cache import ROOM_TOKENS
from offload.request import FUSED_KINDS
from tests.hf.reference import flat, prompt
from tests.tiny_models import build_tiny

FAMILIES = ("mixtral", "qwen3_moe", "glm4_moe", "olmoe", "minimax_m2", "hunyuan_v1_moe")
OTHERS = [kind for kind in FUSED_KINDS if kind != "decoder"]
PROMPT_TOKENS = 17


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each forward of a model that could have been one pass, whether it was."""
    seen: list[bool] = []
    original = CausalPass.run

    def run(self: CausalPass, args: tuple[Any, ...], passed: dict[str, Any]) -> Any:
        done = original(self, args, passed)
        seen.append(done is not None)
        return done

    monkeypatch.setattr(CausalPass, "run", run)
    return seen


def pair(family: str = "qwen3_moe", dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedModel]:
    passing, plain = (build_tiny(family, dtype).requires_grad_(False) for _ in range(2))
    fuse(passing, FUSED_KINDS)
    fuse(plain, OTHERS)
    return passing, plain


def after_a_prompt(model: PreTrainedModel, batch: int = 1) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(prompt(batch, PROMPT_TOKENS), past_key_values=cache)
    return cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_has_the_bits_of_the_models_own_code(family: str, dtype: torch.dtype, passes: list[bool]) -> None:
    passing, plain = pair(family, dtype)
    found = []
    for model in (passing, plain):
        cache, outs = after_a_prompt(model, 2), []
        # Across the end of the cache's room.
        for step, token in enumerate(prompt(2, ROOM_TOKENS, seed=1).T[:, :, None]):
            seen = PROMPT_TOKENS + step + 1
            options: dict[str, Any] = {"logits_to_keep": step % 3} if step % 4 else {}
            if step % 2:
                options["attention_mask"] = torch.ones(2, seen, dtype=torch.int64)
            outs.append(model(input_ids=token, past_key_values=cache, **options).logits)
        outs += [layer.keys.flatten() for layer in cache.layers] + [layer.values.flatten() for layer in cache.layers]
        found.append(outs)
    assert all(map(torch.equal, *found))
    assert passes == [False, *[True] * ROOM_TOKENS]


def test_the_output_is_that_of_the_models_own_code(passes: list[bool]) -> None:
    passing, plain = pair("mixtral")
    outs: list[Any] = []
    for model in (passing, plain):
        cache = after_a_prompt(model)
        outs.append(model(input_ids=prompt(1, 1), past_key_values=cache))
        assert outs[-1].past_key_values is cache
    first, second = outs
    assert passes == [False, True]
    assert type(first) is type(second) and [*vars(first)] == [*vars(second)] and [*first] == [*second]
    assert torch.equal(first["logits"], second["logits"]) and first[0] is first.logits
    assert first.loss is None and len(first.to_tuple()) == 2
    first.loss = torch.zeros(())
    assert [*first] == ["logits", "past_key_values", "loss"]
    # The caller's own: the next pass does not write to it.
    kept = first.logits.clone()
    passing(input_ids=prompt(1, 1, seed=5), past_key_values=first.past_key_values)
    assert torch.equal(first.logits, kept)
    unpickled = pickle.loads(pickle.dumps(type(first)(logits=kept)))
    assert torch.equal(unpickled.logits, kept)


def test_tokens_may_come_without_a_name(passes: list[bool]) -> None:
    passing, plain = pair()
    token = prompt(1, 1)
    found = [model(token, past_key_values=after_a_prompt(model)).logits for model in (passing, plain)]
    assert torch.equal(*found)
    assert passes == [False, True]
    with pytest.raises(TypeError, match="multiple values"):
        passing(token, input_ids=token, past_key_values=after_a_prompt(passing))


CALLS: dict[str, dict[str, Any]] = {
    "labels": {"labels": torch.tensor([[1]])},
    "hidden states": {"output_hidden_states": True},
    "router logits": {"output_router_logits": True},
    "a tuple": {"return_dict": False},
    "chosen positions": {"logits_to_keep": torch.tensor([0])},
    "fewer than none": {"logits_to_keep": -1},
    "padding": {"attention_mask": torch.tensor([[0] + [1] * PROMPT_TOKENS])},
    "no cache wanted": {"use_cache": False},
}


@pytest.mark.parametrize("asked", CALLS)
def test_what_is_asked_for_beside_goes_the_own_way(asked: str, passes: list[bool]) -> None:
    found = []
    for model in pair():
        cache = after_a_prompt(model)
        found.append(flat(model(input_ids=prompt(1, 1), past_key_values=cache, **CALLS[asked])))
    assert len(found[0]) == len(found[1])
    for mine, own in zip(*found, strict=True):
        # A loss of one token is the mean of nothing.
        assert torch.equal(mine.nan_to_num(), own.nan_to_num())
    assert not any(passes)


def hook_on_decoder(model: PreTrainedModel) -> None:
    def double(_module: nn.Module, _args: object, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    model.get_decoder().register_forward_hook(double)


def hook_on_head(model: PreTrainedModel) -> None:
    model.lm_head.register_forward_hook(lambda _module, _args, output: output * 2)


def other_head(model: PreTrainedModel) -> None:
    model.lm_head = nn.Sequential(model.lm_head, nn.ReLU())


def weight_of_head(model: PreTrainedModel) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2, requires_grad=False)


def memory_of_the_heads_weight(model: PreTrainedModel) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data * 2


def forward_of_head(model: PreTrainedModel) -> None:
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(x) * 2


def forward_of_decoder(model: PreTrainedModel) -> None:
    hook_on = model.get_decoder()
    plain = hook_on.forward

    def doubled(*args: Any, **passed: Any) -> Any:
        out = plain(*args, **passed)
        out.last_hidden_state = out.last_hidden_state * 2
        return out

    hook_on.forward = doubled


def in_place(model: PreTrainedModel) -> None:
    model.lm_head.weight.mul_(2)


@pytest.mark.parametrize(
    "change",
    [
        hook_on_decoder, hook_on_head, other_head, weight_of_head, memory_of_the_heads_weight, forward_of_head,
        forward_of_decoder, in_place,
    ],
)  # fmt: skip
def test_what_a_user_changes_is_heeded(change: Callable[[PreTrainedModel], None], passes: list[bool]) -> None:
    found = []
    for model in pair():
        cache = after_a_prompt(model)
        before = model(input_ids=prompt(1, 1), past_key_values=cache).logits
        cache.crop(-1)
        with torch.no_grad():
            change(model)
        after = model(input_ids=prompt(1, 1), past_key_values=cache).logits
        assert not torch.equal(before, after)
        found.append(after)
    assert torch.equal(*found)
    assert passes == [False, True, change is in_place]


def test_gradients_of_the_output_layer_go_the_own_way(passes: list[bool]) -> None:
    passing, _ = pair(dtype=torch.float32)
    cache = after_a_prompt(passing)
    passing.lm_head.requires_grad_(True)
    assert passing(input_ids=prompt(1, 1), past_key_values=cache).logits.requires_grad
    assert not any(passes)
    with torch.no_grad():
        assert passing(input_ids=prompt(1, 1), past_key_values=cache).logits.isfinite().all()
    assert passes == [False, False, True]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_run_their_own_code(copied: Callable[[PreTrainedModel], PreTrainedModel], passes: list[bool]) -> None:
    passing, _ = pair()
    assert isinstance(passing.forward, CausalForward)
    assert type(passing) is type(build_tiny("qwen3_moe"))
    other = copied(passing)
    other.lm_head.weight.mul_(2)
    found = [model(input_ids=prompt(1, 4)).logits for model in (passing, other)]
    assert torch.equal(2 * found[0], found[1])
    assert inspect.signature(passing.forward) == inspect.signature(other.forward)
    assert passes == [False]


@pytest.mark.parametrize("form", ["scaled", "clipped", "biased", "cast"])
def test_other_forms_are_not_mistaken(form: str) -> None:
    model = build_tiny("mixtral", torch.bfloat16).requires_grad_(False)
    plain = type(model)

    class Other(plain):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **passed: Any) -> Any:
            out = super().forward(*args, **passed)
            logits = out.logits
            out.logits = (
                logits / 2 if form == "scaled"
                else logits.clamp(-30, 30) if form == "clipped"
                else logits + 1 if form == "biased"
                else logits.float()
            )  # fmt: skip
            return out

    model.__class__ = Other
    assert fuse(model, FUSED_KINDS)["decoder"] == 3
    assert "forward" not in model.__dict__


def test_caches_take_turns_on_one_tape(passes: list[bool]) -> None:
    """What is known of the cache that was written last is not taken for another's, nor for its own after a change."""
    found = []
    for model in pair():
        caches = [after_a_prompt(model), after_a_prompt(model)]
        outs = []

        def step(cache: DynamicCache, token: int, model: Any = model, outs: list[torch.Tensor] = outs) -> None:
            outs.append(model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits)

        for turn in range(3):
            for cache in caches:
                step(cache, turn)
                step(cache, turn + 1)
        caches[0].crop(-2)
        step(caches[0], 9)
        assert caches[0].layers[1].keys.shape[2] == PROMPT_TOKENS + 5
        step(caches[0], 10)
        twin = copy.deepcopy(caches[0])
        step(twin, 11)
        step(caches[0], 12)
        step(twin, 13)
        caches[1].reorder_cache(torch.tensor([0]))
        step(caches[1], 14)
        caches[1].layers[0], caches[1].layers[1] = caches[1].layers[1], caches[1].layers[0]
        step(caches[1], 15)
        outs += [layer.values for cache in (*caches, twin) for layer in cache.layers]
        found.append(outs)
    assert all(map(torch.equal, *found))
    # Beside the two prompts: a copy, and a cache in another order, get buffers of their own by the model's own code.
    assert passes.count(True) == len(passes) - 4


def test_nothing_keeps_a_cache_that_nobody_has(passes: list[bool]) -> None:
    passing, _ = pair()
    cache = after_a_prompt(passing)
    for token in range(3):
        passing(input_ids=torch.tensor([[token]]), past_key_values=cache)
    gone = [weakref.ref(layer) for layer in cache.layers]
    buffer = weakref.ref(cache.layers[0]._buffers[0])
    # A larger prompt moves a layer to other buffers: those that it has left go.
    passing(input_ids=prompt(1, 2 * ROOM_TOKENS), past_key_values=cache)
    assert buffer() is None
    passing(input_ids=prompt(1, 1), past_key_values=cache)
    del cache
    assert [layer() for layer in gone] == [None] * len(gone)
