"""One loaded model that a benchmark drives: ours, transformers, or transformers with accelerate's disk offload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.machine import CpuClock, disk_read_nbytes, evict, memory_status, reset_peak, sync
from offload.request import PREFILL_CHUNK_TOKENS

Kind = Literal["ours", "transformers", "accelerate"]


@dataclass(frozen=True)
class ModelOptions:
    """How to load a model.

    Attributes:
        kind: what runs it.
        checkpoint: directory.
        ram: budget in bytes; transformers alone has none.
        store: directory of the expert store for ours, of the offloaded weights for accelerate.
        context: longest sequence in tokens.
        quant: packed format of ours, or of each part.
        batch: sequences at once.
        warm_up: a small checkpoint that ours runs before memory is looked at, so that compiled kernels and imports do
            not count; empty for none.
        prefill_chunk: most prompt tokens of ours that room is kept for.
    """

    kind: Kind
    checkpoint: str
    ram: int = 0
    store: str = ""
    context: int = 1024
    quant: str | Mapping[str, str] | None = None
    batch: int = 1
    warm_up: str = ""
    prefill_chunk: int = PREFILL_CHUNK_TOKENS


@dataclass(frozen=True)
class Decoded:
    """Greedy tokens.

    Attributes:
        tokens: in order, the one that the prompt's pass chose first.
        margins: how far the chosen logit was above the next in the pass that read each token.
    """

    tokens: list[int]
    margins: list[float]


@dataclass(frozen=True)
class Fed:
    """Passes of one given token each.

    Attributes:
        tokens_per_s: speed.
        disk_nbytes: bytes read from disk by each.
        hit_rate: share of routed experts that were resident; None where nothing counts it.
        others: share of the CPUs' time that other processes had, 0 to 1.
    """

    tokens_per_s: float
    disk_nbytes: float
    hit_rate: float | None
    others: float = 0.0


disable_progress_bar()


def load_model(options: ModelOptions) -> PreTrainedModel:
    """The model, in `eval()`."""
    if options.kind == "ours":
        import offload

        ours: PreTrainedModel = offload.load(
            options.checkpoint,
            ram=options.ram,
            nvme=options.store,
            context=options.context,
            batch=options.batch,
            prefill_chunk=options.prefill_chunk,
            quant=options.quant,
            progress=False,
        )
        return ours
    placed: dict[str, Any] = {}
    if options.kind == "accelerate":
        placed = {"device_map": "auto", "max_memory": {"cpu": options.ram}, "offload_folder": options.store}
    theirs: PreTrainedModel = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype="auto", **placed)
    theirs.eval()
    return theirs


class Session:
    """Drives one model through the same calls whatever runs it. All choices of tokens are greedy."""

    def __init__(self, options: ModelOptions) -> None:
        self._batch = options.batch
        self._evicted: list[Path] = []
        self._cache = DynamicCache()
        self._last = 0
        if options.warm_up:
            self._warm_up(options)
        reset_peak()
        self._memory_before = memory_status()["VmRSS"]
        self.model = load_model(options)
        if options.kind == "accelerate":
            # Without this its files stay in free memory as page cache, and its budget bounds nothing.
            offloaded = [path for path in Path(options.store).rglob("*") if path.is_file()]
            self._evicted = [*offloaded, *Path(options.checkpoint).glob("*.safetensors")]
            sync(self._evicted)

    def _warm_up(self, options: ModelOptions) -> None:
        """Load and run a small model in the same format, and forget it."""
        self.model = load_model(replace(options, checkpoint=options.warm_up, ram=1 << 30, context=64))
        self.start([1] * 32 * self._batch)
        self.feed([1] * 2 * self._batch)
        self.close()
        del self.model
        self._cache = DynamicCache()

    def memory(self) -> dict[str, int]:
        """Bytes of this process before the model was loaded, and its peak since."""
        return {"before_nbytes": self._memory_before, "peak_nbytes": memory_status()["VmHWM"]}

    def describe(self) -> dict[str, Any]:
        """What lies where."""
        if hasattr(self.model, "offload"):
            runtime: Any = self.model.offload
            plan = runtime.plan
            return {"slots": plan.ram_slots, "experts": plan.expert_count, "peak_ram_nbytes": plan.peak_ram_nbytes}
        placed = list(getattr(self.model, "hf_device_map", {}).values())
        return {"modules": len(placed), "modules_on_disk": placed.count("disk")}

    def use_experts(self, implementation: str) -> None:
        """Choose transformers' experts implementation."""
        self.model.set_experts_implementation(implementation)

    @torch.no_grad()
    def logits(self, prompt: list[int], file: str) -> None:
        """Save the logits of every prompt token, fp32 [T, V], as npy."""
        found = self.model(input_ids=torch.tensor([prompt])).logits[0]
        np.save(file, found.float().numpy())

    @torch.no_grad()
    def start(self, prompt: list[int]) -> float:
        """Begin a sequence; seconds of the forward pass over the prompt, its last logits and the choice of a token.

        With a batch, `prompt` has the tokens of one sequence after another.
        """
        self._cache = DynamicCache(config=self.model.config)
        return self._forward(prompt)[0]

    @torch.no_grad()
    def decode(self, count: int) -> Decoded:
        """Go on with the sequence greedily: `count` forward passes of one token."""
        tokens: list[int] = []
        margins: list[float] = []
        for _ in range(count):
            tokens.append(self._last)
            best = self._forward([self._last])[1].float().topk(2).values
            margins.append(float(best[0] - best[1]))
        return Decoded(tokens, margins)

    @torch.no_grad()
    def feed(self, tokens: list[int]) -> Fed:
        """Go on with the sequence with these tokens, one forward pass for each (of each sequence), and measure that."""
        self._reset_counters()
        read_before, before = disk_read_nbytes(), CpuClock.now()
        starts = range(0, len(tokens), self._batch)
        seconds = sum(self._forward(tokens[start : start + self._batch])[0] for start in starts)
        others = CpuClock.now().others_since(before)
        return Fed(len(tokens) / seconds, (disk_read_nbytes() - read_before) / len(tokens), self._hit_rate(), others)

    @torch.no_grad()
    def prefill(self, prompt: list[int]) -> Fed:
        """Begin a sequence as `start` does, and measure that."""
        self._cache = DynamicCache(config=self.model.config)
        self._reset_counters()
        read_before, before = disk_read_nbytes(), CpuClock.now()
        seconds = self._forward(prompt)[0]
        others = CpuClock.now().others_since(before)
        return Fed(len(prompt) / seconds, (disk_read_nbytes() - read_before) / len(prompt), self._hit_rate(), others)

    def _forward(self, tokens: list[int]) -> tuple[float, torch.Tensor]:
        """(seconds of a pass and the choice of a token, last logits [V]); evicts accelerate's files before it."""
        evict(self._evicted)
        ids = torch.tensor(tokens).reshape(self._batch, -1)
        before = perf_counter()
        logits = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        self._last = int(logits[:, -1].argmax(-1)[0])
        return perf_counter() - before, logits[0, -1]

    def _reset_counters(self) -> None:
        if hasattr(self.model, "offload"):
            runtime: Any = self.model.offload
            runtime.reset_stats()

    def _hit_rate(self) -> float | None:
        if hasattr(self.model, "offload"):
            runtime: Any = self.model.offload
            return float(runtime.stats().hit_rate)
        return None

    def close(self) -> None:
        """Free what the runtime holds."""
        if hasattr(self.model, "offload"):
            runtime: Any = self.model.offload
            runtime.close()
