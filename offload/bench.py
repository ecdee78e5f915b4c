"""A model run on random tokens, and what was predicted of it beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from transformers import DynamicCache, PreTrainedModel

from offload.devices.host_accelerator import HostAccelerator
from offload.reconciliation import Reconciliation, reconcile_phases
from offload.runtime import Runtime
from offload.statistics import Statistics
from placement.hardware_profile import HardwareProfile, Speeds
from placement.plan import Plan
from placement.planner import can_predict, predicted
from placement.predict import Routing
from profiler.stream import stream_bytes_per_s

_PROBE_REPEATS = 8
_SEED = 4


@dataclass(frozen=True)
class Amount:
    """What is run.

    Attributes:
        batch: sequences at once.
        prompt_tokens: of each.
        new_tokens: decoded for each and measured; as many as a quarter of them are decoded before.
        prompts: passes of a prompt that are measured, each of another prompt; one more runs before.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    prompts: int

    @property
    def warm_tokens(self) -> int:
        """Decoded before counting begins, so that slots hold what decode needs."""
        return max(2, self.new_tokens // 4)

    @property
    def context_tokens(self) -> int:
        """The longest sequence that comes about."""
        return self.prompt_tokens + self.warm_tokens + self.new_tokens


@dataclass(frozen=True)
class Bench:
    """What came of a run.

    Attributes:
        reconciliation: predicted beside measured.
        plan: with the prediction for what was run.
        prefill: counted over the prompts.
        decode: counted over the new tokens.
        stream_bytes_per_s: memory read right before, by which the profile was scaled; None where nothing was predicted
            or it was not asked for.
    """

    reconciliation: Reconciliation
    plan: Plan
    prefill: Statistics
    decode: Statistics
    stream_bytes_per_s: float | None


def run_bench(
    model: PreTrainedModel,
    amount: Amount,
    profile: HardwareProfile | None,
    routing: Routing | None = None,
    *,
    probe: bool = True,
) -> Bench:
    """Run a loaded model on random tokens and reconcile it with its prediction.

    Args:
        model: an offloaded model whose plan has room for the amount.
        amount: what to run.
        profile: the machine as it was measured, None to predict nothing.
        routing: what is known of the experts' popularity; None takes them as alike, as random tokens mostly do.
        probe: stream memory for about a second before, and scale the profile by what that finds.
    """
    runtime = cast("Runtime", model.offload)
    tokens = _Tokens(model.config.get_text_config().vocab_size)
    _prefill(model, tokens, amount)
    speed = stream_bytes_per_s(repeats=_PROBE_REPEATS) if probe and profile is not None else None
    prefill, cache = _measure_prompts(model, runtime, tokens, amount)
    _decode(model, cache, tokens, amount, amount.warm_tokens)
    runtime.reset_stats()
    _decode(model, cache, tokens, amount, amount.new_tokens)
    decode = runtime.stats()
    if profile is not None and speed is not None:
        profile = profile.with_speeds(Speeds(memory=speed / profile.cpu.memory_bytes_per_s))
    plan = predict_run(runtime, amount, profile, routing)
    memory = None if runtime.memory is None else runtime.memory.until_now()
    return Bench(reconcile_phases(plan, prefill, decode, memory), plan, prefill, decode, speed)


def predict_run(runtime: Runtime, amount: Amount, profile: HardwareProfile | None, routing: Routing | None) -> Plan:
    """The runtime's plan with a prediction for what was run, whatever it was loaded for.

    None is made of an accelerator that the profile does not know, one that the host plays among them.
    """
    # Decode is predicted half-way through the new tokens, those of warming up among them.
    workload = replace(
        runtime.plan.workload,
        batch=amount.batch,
        prompt_tokens=amount.prompt_tokens,
        new_tokens=2 * amount.warm_tokens + amount.new_tokens,
    )
    slots, vram, told = runtime.tier.table.usable_slots, runtime.plan.vram, None
    above = runtime.accelerated
    played = above is not None and isinstance(above.accelerator, HostAccelerator)
    if profile is not None and not played and can_predict(profile, vram):
        told = predicted(runtime.spec, profile, slots, workload, routing, runtime.plan.kv, vram)
    return replace(runtime.plan, workload=workload, prediction=told)


class _Tokens:
    """Random tokens, the same in every run."""

    def __init__(self, vocab_size: int) -> None:
        self._generator = torch.Generator().manual_seed(_SEED)
        self._vocab_size = vocab_size

    def take(self, batch: int, count: int) -> torch.Tensor:
        """int64 [batch, count]."""
        return torch.randint(self._vocab_size, (batch, count), generator=self._generator)


def _measure_prompts(
    model: PreTrainedModel, runtime: Runtime, tokens: _Tokens, amount: Amount
) -> tuple[Statistics, DynamicCache]:
    """(what prompts took, the cache of the last)."""
    runtime.reset_stats()
    for number in range(amount.prompts):
        cache = _prefill(model, tokens, amount)
        if number + 1 < amount.prompts:
            # Caches that are alive take slots from the next pass.
            del cache
    return runtime.stats(), cache


def _prefill(model: PreTrainedModel, tokens: _Tokens, amount: Amount) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    chunk = cast("Runtime", model.offload).plan.workload.prefill_chunk_tokens
    for ids in tokens.take(amount.batch, amount.prompt_tokens).split(chunk, dim=1):
        _forward(model, cache, ids)
    return cache


def _decode(model: PreTrainedModel, cache: DynamicCache, tokens: _Tokens, amount: Amount, count: int) -> None:
    for _ in range(count):
        _forward(model, cache, tokens.take(amount.batch, 1))


@torch.no_grad()
def _forward(model: PreTrainedModel, cache: DynamicCache, ids: torch.Tensor) -> None:
    """A pass and the choice of a token."""
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    logits[:, -1].argmax(-1).tolist()
