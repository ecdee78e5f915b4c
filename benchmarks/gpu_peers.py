"""How else a model could run on a card that is too small for it, at the same budget: the baselines of `gpu_models`."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from benchmarks.harness import Row
from offload.devices.link import Link
from offload.moe.costs import ObservedCosts
from offload.runtime import Runtime
from prefetch.scheduler.records import LayerCosts

_NEVER_S = 1e6


class _Told(ObservedCosts):
    """Costs with which the scheduler always decides in one way."""

    def __init__(self, link: Link, told: Callable[[LayerCosts], LayerCosts]) -> None:
        super().__init__(link, 1.0)
        self._told = told

    def of_layer(self, bundle_nbytes: int) -> LayerCosts:
        """See `ObservedCosts.of_layer`."""
        return self._told(super().of_layer(bundle_nbytes))


def leave_to_cpu(runtime: Runtime) -> None:
    """Let the CPU compute every expert that is not in VRAM, and nothing be copied: kTransformers' static split."""
    _tell(runtime, lambda costs: replace(costs, link_expert_s=float("inf")))


def copy_all(runtime: Runtime) -> None:
    """Let every expert that is not in VRAM be copied there before it is computed: loading on demand."""
    _tell(runtime, lambda costs: replace(costs, cpu_expert_s=_NEVER_S))


def _tell(runtime: Runtime, told: Callable[[LayerCosts], LayerCosts]) -> None:
    accelerated = runtime.accelerated
    assert accelerated is not None
    accelerated.costs = _Told(accelerated.accelerator.link, told)


def release() -> None:
    """Free the memory of models that nobody has any more: they are part of cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def accelerate_row(
    checkpoint: Path, vram_nbytes: int, ram_nbytes: int, device: str, ids: torch.Tensor, new_tokens: int
) -> tuple[list[int], Row]:
    """Transformers with accelerate's dispatch: layers that do not fit lie in RAM and are copied for every pass.

    Args:
        checkpoint: directory.
        vram_nbytes: of the card that may be used, weights and all.
        ram_nbytes: of host memory.
        device: "cuda:N"; "host" for the CPU alone, where there is no card.
        ids: int64 [1, tokens].
        new_tokens: decoded greedily.

    Returns:
        (the tokens, speeds of decode and of the prompt).
    """
    placed: dict[str | int, int] = {"cpu": ram_nbytes}
    if device != "host":
        placed[torch.device(device).index or 0] = vram_nbytes
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype="auto", device_map="auto", max_memory=placed
    )
    model.eval()
    ids = ids.to(model.device)
    _passes(model, ids, 2)
    tokens, prompt_s, decode_s = _passes(model, ids, new_tokens)
    return tokens, {
        "decode_tokens_per_s": (new_tokens - 1) / decode_s,
        "prefill_tokens_per_s": ids.shape[1] / prompt_s,
    }


@torch.no_grad()
def _passes(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> tuple[list[int], float, float]:
    """(greedy tokens, seconds of the prompt, seconds of the others)."""
    cache, tokens, times = DynamicCache(config=model.config), list[int](), [perf_counter()]
    while len(tokens) < new_tokens:
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        tokens.append(int(logits[0, -1].argmax()))
        times.append(perf_counter())
        ids = torch.tensor([[tokens[-1]]], device=ids.device)
    return tokens, times[1] - times[0], times[-1] - times[1]
