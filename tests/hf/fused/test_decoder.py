"""The stack on a tape against the layers' own code with the same kernels: the same bits, or it keeps out of the way."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

import offload
from cpu_kernels.tape import Tape
from offload.hf.fused import decoder, fuse
from offload.hf.fused.decoder_parts import find_parts
from offload.hf.fused.kv_cache import ROOM_TOKENS
from offload.hf.fused.moe_parts import find_moe_parts
from offload.hf.fused.stack import Stack
from offload.hf.fused.swap import STACK
from offload.request import FUSED_KINDS
from tests.conftest import TinyCheckpoint
from tests.hf.reference import prompt
from tests.tiny_models import ARCHITECTURES, build_tiny

TAPED = {"mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "olmoe", "minimax_m2", "hunyuan_v1_moe"}
WHOLE = {"mixtral", "qwen3_moe", "olmoe"}
OTHERS = [kind for kind in FUSED_KINDS if kind != "decoder"]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each play of a tape ran."""
    played: list[int] = []
    original = Tape.play

    def play(self: Tape, pool: object, first: int = 0, end: int | None = None) -> int:
        ended = original(self, pool, first, end)  # type: ignore[arg-type]
        played.append(ended - first)
        return ended

    monkeypatch.setattr(Tape, "play", play)
    return played


def decoded(model: PreTrainedModel, ids: torch.Tensor, new: int, **options: object) -> torch.Tensor:
    """Logits of `new` tokens, each the likeliest."""
    found = model.generate(
        ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, return_dict_in_generate=True, pad_token_id=0,
        output_logits=True, eos_token_id=None, **options,
    )  # fmt: skip
    return torch.stack(found.logits)


def pair(family: str, dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedModel]:
    taped, plain = (build_tiny(family, dtype).requires_grad_(False) for _ in range(2))
    fuse(taped, FUSED_KINDS)
    fuse(plain, OTHERS)
    return taped, plain


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_loaded_models_have_the_bits_of_their_own_code(
    family: str, tiny_checkpoint: TinyCheckpoint, store_root: Path, rows: list[int]
) -> None:
    directory = tiny_checkpoint(family, torch.bfloat16)
    found = []
    for kinds in (FUSED_KINDS, OTHERS):
        model = offload.load(directory, ram="1GiB", nvme=store_root, context=192, fused=kinds)
        with model.offload as runtime:
            # Across the end of the cache's room.
            found.append(decoded(model, prompt(batch=2), ROOM_TOKENS + 2))
            taped = len(model.model.layers) if kinds is FUSED_KINDS and family in TAPED else 0
            assert runtime.stats().fused.get("decoder", 0) == taped
            assert runtime.stats().misses == 0
            runtime.check()
    assert torch.equal(*found)
    assert bool(rows) == (family in TAPED)


@pytest.mark.parametrize("quant", [None, "int8"])
@pytest.mark.parametrize("resident", [True, False])
def test_experts_on_the_tape_and_on_their_way(
    resident: bool, quant: str | None, tiny_checkpoint: TinyCheckpoint, store_root: Path, rows: list[int]
) -> None:
    directory = tiny_checkpoint("qwen3_moe", torch.bfloat16)
    plan = offload.plan(directory, ram="1GiB", context=64, quant=quant)
    ram = plan.minimum_ram_nbytes + (1 << 20 if resident else 3 * plan.slot_nbytes)
    found, hits = [], []
    for kinds in (FUSED_KINDS, OTHERS):
        model = offload.load(directory, ram=ram, nvme=store_root, context=64, fused=kinds, quant=quant)
        with model.offload as runtime:
            assert (runtime.plan.ram_slots == runtime.plan.expert_count) == resident
            found.append(decoded(model, prompt(), 12))
            hits.append(runtime.stats().hits + runtime.stats().misses)
            runtime.check()
    assert torch.equal(*found)
    assert hits[0] == hits[1]
    layers = len(model.model.layers)
    # All layers in one call, or each one's attention and choice by itself, and then the experts as they come.
    assert len(rows) >= 11 and (max(rows) > 15 * layers) == resident and (rows.count(1) >= 11 * layers) != resident


@pytest.mark.parametrize("prefetch", ["on", "auto"])
def test_reading_ahead_goes_with_experts_that_come_to_the_tape(
    prefetch: str, tiny_checkpoint: TinyCheckpoint, store_root: Path, rows: list[int]
) -> None:
    directory = tiny_checkpoint("qwen3_moe", torch.bfloat16)
    plan = offload.plan(directory, ram="1GiB", context=64)
    ram = plan.minimum_ram_nbytes + 12 * plan.slot_nbytes
    found, foreseen = [], []
    for kinds in (FUSED_KINDS, OTHERS):
        model = offload.load(directory, ram=ram, nvme=store_root, context=64, fused=kinds, prefetch=prefetch)
        with model.offload as runtime:
            told: list[tuple[int, list[float]]] = []
            prefetcher = runtime.observer.prefetcher
            assert prefetcher is not None
            foresight: Any = prefetcher._foresight
            original = foresight.choose

            def choose(layer, said, active, told=told, original=original, **options):  # type: ignore[no-untyped-def]
                told.append((layer, [*said.reshape(-1).tolist(), *active.tolist()]))
                return original(layer, said, active, **options)

            foresight.choose = choose
            found.append(decoded(model, prompt(), 12))
            foreseen.append(told)
            runtime.check()
    assert torch.equal(*found)
    # What was unlikely and on its way, and so asked for again, is another matter.
    one_by_one = [dict.fromkeys((layer, tuple(said)) for layer, said in told) for told in foreseen]
    assert list(one_by_one[0]) == list(one_by_one[1]) and len(one_by_one[0]) >= 8
    assert rows.count(1) >= 11 * len(model.model.layers)


@pytest.mark.parametrize("known", [True, False])
def test_equal_shares_are_chosen_as_torch_does(
    tiny_checkpoint: TinyCheckpoint, store_root: Path, rows: list[int], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setattr("cpu_kernels.tape.orders_as_torch", lambda experts, top_k: False)
    directory = tiny_checkpoint("qwen3_moe", torch.bfloat16)
    found = []
    for kinds in (FUSED_KINDS, OTHERS):
        model = offload.load(directory, ram="1GiB", nvme=store_root, context=64, fused=kinds)
        with model.offload:
            for layer in model.model.layers:
                # In pairs, every expert has an equal.
                layer.mlp.gate.weight.data[1::2] = layer.mlp.gate.weight.data[::2]
            found.append(decoded(model, prompt(), 8))
    assert torch.equal(*found)
    # The tape stops for each choice that it leaves to torch.
    assert (len(rows) > 7 * 3) != known


def hook(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: None)


def hook_on_router(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.gate.register_forward_pre_hook(lambda *_: None)


def hook_on_block(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _args, output: output * 2)


def hook_on_layer(model: PreTrainedModel) -> None:
    model.model.layers[1].register_forward_hook(lambda _module, _args, output: output + 1)


def other_forward(model: PreTrainedModel) -> None:
    projection = model.model.layers[2].self_attn.q_proj
    plain = type(projection).forward
    projection.forward = lambda x: plain(projection, x) * 2


def other_weight(model: PreTrainedModel) -> None:
    projection = model.model.layers[0].self_attn.o_proj
    projection.weight = nn.Parameter(projection.weight * 2, requires_grad=False)


def other_data(model: PreTrainedModel) -> None:
    norm = model.model.layers[0].input_layernorm
    norm.weight.data = norm.weight.data * 2


def eager(model: PreTrainedModel) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize(
    "change", [hook, hook_on_router, hook_on_block, hook_on_layer, other_forward, other_weight, other_data, eager]
)
def test_what_a_user_changes_is_heeded(change: Callable[[PreTrainedModel], None], rows: list[int]) -> None:
    taped, plain = pair("qwen3_moe")
    decoded(taped, prompt(), 4)
    assert rows
    rows.clear()
    for model in (taped, plain):
        change(model)
    expected = decoded(plain, prompt(), 4)
    assert torch.equal(decoded(taped, prompt(), 4), expected)
    # Blocks run by their own code here, for there is no runtime.
    assert bool(rows) == (change in (hook_on_router, hook_on_block))


def test_hooks_in_blocks_are_called(tiny_checkpoint: TinyCheckpoint, store_root: Path, rows: list[int]) -> None:
    directory = tiny_checkpoint("qwen3_moe", torch.bfloat16)
    found = []
    for kinds in (FUSED_KINDS, OTHERS):
        model = offload.load(directory, ram="1GiB", nvme=store_root, context=64, fused=kinds)
        with model.offload:
            hook_on_block(model)
            found.append(decoded(model, prompt(), 4))
    assert torch.equal(*found)
    assert rows and max(rows) < 20


def test_weights_changed_in_place_are_seen(rows: list[int]) -> None:
    taped, plain = pair("mixtral")
    decoded(taped, prompt(), 3)
    for model in (taped, plain):
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
    assert torch.equal(decoded(taped, prompt(), 3), decoded(plain, prompt(), 3))
    assert rows


@pytest.mark.parametrize("what", ["padding", "nine sequences", "gradients", "autocast", "beams", "cropped", "no cache"])
def test_what_a_tape_does_not_take_goes_the_own_way(what: str) -> None:
    taped, plain = pair("qwen3_moe", torch.float32)
    found = []
    for model in (taped, plain):
        ids = prompt(batch=9 if what == "nine sequences" else 2)
        if what == "padding":
            mask = torch.ones_like(ids)
            mask[0, :5] = 0
            found.append(decoded(model, ids, 4, attention_mask=mask))
        elif what == "nine sequences":
            found.append(decoded(model, ids, 4))
        elif what == "beams":
            found.append(model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0))
        elif what == "no cache":
            found.append(model(ids[:, :1], use_cache=False).logits)
        elif what == "cropped":
            cache = DynamicCache(config=model.config)
            model(ids, past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
            cache.crop(-3)
            found.append(model(ids[:, 1:2], past_key_values=cache).logits)
        else:
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(ids, past_key_values=cache)
            embedded = model.get_input_embeddings()(ids[:, :1]).detach()
            if what == "gradients":
                embedded.requires_grad_(True)
                out = model(inputs_embeds=embedded, past_key_values=cache).logits
                assert out.requires_grad
            else:
                with torch.autocast("cpu", torch.bfloat16):
                    out = model(inputs_embeds=embedded, past_key_values=cache).logits
            found.append(out.detach())
    assert torch.equal(*found)


def test_inference_mode_comes_and_goes(rows: list[int]) -> None:
    taped, plain = pair("qwen3_moe")
    found = []
    for model in (taped, plain):
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(prompt(), past_key_values=cache)
            model(prompt()[:, :1], past_key_values=cache)
        with torch.no_grad():
            outs = [model(prompt()[:, i : i + 1], past_key_values=cache).logits for i in range(3)]
            outs.append(model(prompt()[:, :3], past_key_values=cache).logits)
        with torch.inference_mode():
            outs.append(model(prompt()[:, :1], past_key_values=cache).logits)
        found.append(torch.cat([out[:, -1] for out in outs]))
    assert torch.equal(*found)
    assert len(rows) >= 5


def test_hidden_states_are_those_of_every_layer() -> None:
    taped, plain = pair("qwen3_moe")
    states = []
    for model in (taped, plain):
        cache = DynamicCache(config=model.config)
        model(prompt(), past_key_values=cache)
        for _ in range(2):
            out = model(prompt()[:, :1], past_key_values=cache, output_hidden_states=True, output_router_logits=True)
        states.append([*out.hidden_states, *out.router_logits])
    assert all(map(torch.equal, *states))


def test_a_failing_block_leaves_the_cache_as_it_was() -> None:
    taped, plain = pair("mixtral")
    cache, other = DynamicCache(config=taped.config), DynamicCache(config=plain.config)
    taped(prompt(), past_key_values=cache)
    plain(prompt(), past_key_values=other)
    block = taped.model.layers[1].mlp
    handle = block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        taped(prompt()[:, :1], past_key_values=cache)
    handle.remove()
    assert [layer.get_seq_length() for layer in cache.layers] == [prompt().shape[1]] * len(cache.layers)
    found = taped(prompt()[:, :1], past_key_values=cache).logits
    assert torch.equal(found, plain(prompt()[:, :1], past_key_values=other).logits)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_blocks_that_a_tape_knows(family: str) -> None:
    model = build_tiny(family).requires_grad_(False)
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer, "mlp")]
    assert any(find_moe_parts(block) is not None for block in blocks) == (family in WHOLE)


@pytest.mark.parametrize("change", ["clip", "scale of the residual", "scores"])
def test_other_forms_are_not_mistaken(change: str) -> None:
    model = build_tiny("olmoe").requires_grad_(False)
    if change == "clip":
        model.config.clip_qkv = 2.0
    layer = model.model.layers[0]
    fuse(model, OTHERS)
    angles = layer.self_attn.head_dim
    assert (find_parts(layer, angles) is not None) == (change != "clip")
    if change == "scale of the residual":
        plain = type(layer).forward

        class Scaled(type(layer)):  # type: ignore[misc]
            def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
                return plain(self, *args, **kwargs) * 1.5  # type: ignore[no-any-return]

        layer.__class__ = Scaled
        assert find_parts(layer, angles) is None
    elif change == "scores":
        layer.self_attn.scaling *= 2
        found = find_parts(layer, angles)
        assert found is not None and found.scale == layer.self_attn.scaling


def test_a_model_that_works_between_its_layers_is_left_alone() -> None:
    model = build_tiny("qwen3_moe").requires_grad_(False)
    plain = type(model.model).forward

    class Between(type(model.model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            first = self.layers[1]
            handle = first.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))
            try:
                return plain(self, *args, **kwargs)
            finally:
                handle.remove()

    model.model.__class__ = Between
    fuse(model, OTHERS)
    assert decoder.fuse_decoders(model, None) == 0


def test_without_another_kind_there_is_no_tape() -> None:
    for kind in OTHERS:
        model = build_tiny("qwen3_moe").requires_grad_(False)
        assert fuse(model, [other for other in FUSED_KINDS if other != kind])["decoder"] == 0


def test_a_copy_is_plain_and_a_stack_goes_with_its_model() -> None:
    taped, _ = pair("qwen3_moe")
    ids = prompt()
    decoded(taped, ids, 3)
    copied = copy.deepcopy(taped)
    assert all(STACK not in layer.__dict__ for layer in copied.model.layers)
    assert torch.equal(decoded(copied, ids, 3), decoded(build_tiny("qwen3_moe", torch.bfloat16), ids, 3))
    stack = weakref.ref(taped.model.layers[0].__dict__[STACK][0])
    assert isinstance(stack(), Stack)
    del taped
    gc.collect()
    assert stack() is None
