"""What whole forward passes take beyond their parts: the overheads of a profile.

A model with random weights runs through the runtime with everything in RAM. Where its decoder layers begin and end is
noted by hooks; what the profile's curves predict of its products and attention is taken off. What a curve has wrong for
every model is in the remainder, and so corrected.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from offload.hf.layer_kinds import decoder_layers
from offload.loading import load
from offload.runtime import Runtime
from placement.hardware_profile import HardwareProfile, Overheads
from placement.planner import predicted
from placement.prediction import PassPrediction
from placement.workload import Workload

PROMPT_TOKENS = 256
_CONTEXT_TOKENS = 512
_CACHED_TOKENS = 32
_SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1024,
    "moe_intermediate_size": 512,
    "num_experts": 16,
    "num_experts_per_tok": 8,
    "max_position_embeddings": _CONTEXT_TOKENS,
    "norm_topk_prob": True,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Passes:
    """Measured seconds of passes: of the whole, and of the decoder's layers in it."""

    whole_s: float
    layers_s: float


def measure_overheads(profile: HardwareProfile, directory: Path, repeats: int) -> Overheads:
    """The overheads that make predictions of the model's passes right.

    Args:
        profile: with overheads of zero.
        directory: for the experts; what is written there is removed.
        repeats: passes of decode; a sixth as many of a prompt.
    """
    with TemporaryDirectory(prefix=".offload-profile-", dir=directory) as store:
        model = load(_random_model(), ram=4 << 30, nvme=store, context=_CONTEXT_TOKENS, progress=False)
        with cast("Runtime", model.offload) as runtime:
            decode = _measure(model, 1, repeats)
            prefill = _measure(model, PROMPT_TOKENS, max(3, repeats // 6))
            return _overheads(profile, runtime, decode, prefill)


def _overheads(profile: HardwareProfile, runtime: Runtime, decode: Passes, prefill: Passes) -> Overheads:
    spec = runtime.spec
    workload = Workload(_CONTEXT_TOKENS, prompt_tokens=PROMPT_TOKENS, new_tokens=2)
    one = Workload(_CONTEXT_TOKENS, prompt_tokens=_CACHED_TOKENS, new_tokens=2)
    parts = predicted(spec, profile, runtime.plan.ram_slots, one).decode
    head_s = 0.0 if spec.head is None else profile.cpu.linear(spec.head.format).seconds(spec.head.weights, 1)
    layers = spec.layer_count
    layer_s = max(0.0, (decode.layers_s - _layers_s(parts, head_s)) / layers)
    pass_s = max(0.0, decode.whole_s - decode.layers_s - head_s)
    prompt = predicted(spec, profile, runtime.plan.ram_slots, workload).prefill
    rest = (prefill.layers_s - _layers_s(prompt, head_s)) / layers - layer_s
    return Overheads(pass_s, layer_s, max(0.0, rest) / (PROMPT_TOKENS * spec.hidden_size))


def _layers_s(prediction: PassPrediction, head_s: float) -> float:
    return prediction.seconds - head_s


def _random_model() -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = AutoConfig.for_model("qwen3_moe", **_SIZES)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.eval()
    return model


@torch.no_grad()
def _measure(model: PreTrainedModel, tokens: int, repeats: int) -> Passes:
    """Medians of passes: of one token one after the other in a sequence, of more tokens each of a new one."""
    layers = [layer for _, layer in decoder_layers(model)]
    marks: list[float] = []
    hooks = [
        layers[0].register_forward_pre_hook(lambda *_: marks.append(perf_counter())),
        layers[-1].register_forward_hook(lambda *_: marks.append(perf_counter())),
    ]
    generator = torch.Generator().manual_seed(2)
    vocab = model.config.get_text_config().vocab_size
    whole, inside = [], []
    try:
        cache = DynamicCache(config=model.config)
        if tokens == 1:
            _pass(model, cache, torch.randint(vocab, (1, _CACHED_TOKENS), generator=generator))
        for _ in range(repeats + 1):
            if tokens > 1:
                cache = DynamicCache(config=model.config)
            ids = torch.randint(vocab, (1, tokens), generator=generator)
            marks.clear()
            before = perf_counter()
            _pass(model, cache, ids)
            whole.append(perf_counter() - before)
            inside.append(marks[1] - marks[0])
    finally:
        for hook in hooks:
            hook.remove()
    return Passes(statistics.median(whole[1:]), statistics.median(inside[1:]))


def _pass(model: PreTrainedModel, cache: DynamicCache, ids: torch.Tensor) -> int:
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return int(logits[0, -1].argmax())
