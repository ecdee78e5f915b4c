"""What a run did, in figures that a user can read and compare."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from offload.kv.prefix_files import PrefixStatistics
from offload.kv.statistics import KvStatistics
from offload.prefetcher import Prefetcher
from offload.sizes import format_size
from offload.step_graph.figures import GraphFigures
from offload.tiers.counters import TierCounters
from offload.tiers.expert_tier import ExpertTier
from prefetch.predictors.named import name_of
from prefetch.predictors.skill import Skill


@dataclass
class Passes:
    """Forward passes of the whole model."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0


@dataclass(frozen=True)
class AcceleratorStatistics:
    """What an accelerator's tier did.

    Attributes:
        hits: routed experts found in its slots, once per layer and step.
        misses: routed experts that were not there; the CPU computed them, or they were copied first.
        copies: experts copied.
        bytes_copied: bytes that crossed the link.
        copy_stall_s: seconds that steps waited for copies.
        slots: its expert slots; fewer than planned where it ran out of memory.
        policy: class of its cache policy.
        copies_ahead_issued: experts that began to be copied before their layer came.
        copies_ahead_used: those that were there when they were routed.
        copies_ahead_late: those that were still on their way then; the step waited for them, or the CPU computed them.
        copies_ahead_wasted: those that left, were cancelled or failed before they were routed.
        late_copy_stall_s: seconds of `copy_stall_s` in which all that was waited for had been copied ahead, too late.
        dense_bytes_copied: bytes of dense weights that streamed through its window.
    """

    hits: int
    misses: int
    copies: int
    bytes_copied: int
    copy_stall_s: float
    slots: int
    policy: str
    copies_ahead_issued: int
    copies_ahead_used: int
    copies_ahead_late: int
    copies_ahead_wasted: int
    late_copy_stall_s: float
    dense_bytes_copied: int = 0


def accelerator_statistics(tier: ExpertTier, dense_bytes_copied: int) -> AcceleratorStatistics:
    """The figures so far of an accelerator's tier, and of dense weights that stream there."""
    counters = tier.counters
    return AcceleratorStatistics(
        counters.hits, counters.misses, counters.loads, tier.engine.reader.bytes_read, counters.stall_s,
        tier.table.usable_slots, type(tier.policy).__name__, counters.ahead_issued, counters.ahead_used,
        counters.ahead_late, counters.ahead_wasted, counters.late_stall_s, dense_bytes_copied,
    )  # fmt: skip


def prefetch_figures(counters: TierCounters, prefetcher: Prefetcher | None) -> dict[str, Any]:
    """What `Statistics` says of reading ahead."""
    return {
        "predictor": None if prefetcher is None else name_of(prefetcher.predictor),
        "prefetching": prefetcher is not None and prefetcher.on,
        "prefetches_issued": counters.ahead_issued,
        "prefetches_used": counters.ahead_used,
        "prefetches_late": counters.ahead_late,
        "prefetches_wasted": counters.ahead_wasted,
        "late_stall_s": counters.late_stall_s,
        "skills": () if prefetcher is None else tuple(prefetcher.predictor.skills()),
    }


@dataclass(frozen=True)
class Statistics:
    """Counted since the model was loaded, or since `reset_stats()`.

    Attributes:
        hits: routed experts that were resident; counted once per layer and step.
        misses: routed experts that had to be read.
        evictions: experts that gave up their slot.
        bytes_read: bytes read from the store.
        read_stall_s: seconds that the model waited for reads.
        read_retries: reads that failed or fell short and were repeated.
        direct_io: False where the file system refused O_DIRECT and reads are buffered.
        moe_steps: MoE layers executed.
        moe_s: seconds in them, reads waited for included.
        prefill_tokens: tokens of forward passes with more than one token per sequence.
        prefill_s: seconds of these passes.
        decode_tokens: tokens of forward passes with one token per sequence.
        decode_s: seconds of these passes.
        slots: expert slots in use now.
        slots_planned: expert slots of the plan.
        fused: modules that a kernel computes, by kind; a kind that is switched off is not there.
        policy: class of the cache policy.
        scheduler: "auto" or "off"; of a user's own its class.
        predictor: "auto" or the one source that reading ahead goes by; of a user's own its class; None where nothing
            is foreseen.
        prefetching: whether experts are read ahead at this moment; the controller may have switched it off.
        prefetches_issued: experts that began to be read ahead.
        prefetches_used: those that were there when they were routed.
        prefetches_late: those that were still on their way then.
        prefetches_wasted: those that left or were cancelled before they were routed.
        late_stall_s: seconds of `read_stall_s` in which all that was waited for had been read ahead, too late.
        skills: precision and recall of what was foreseen, by layer and distance, since the model was loaded; empty
            where nothing is foreseen.
        accelerator: what its tier did, None without one. `hits` and `misses` above are then of the experts that it had
            not.
        kv: what the KV cache in blocks did, since it was made; None where caches grow in place.
        prefix: what saved prefixes did, since the model was loaded; None where none are kept.
        graphs: what captured decode steps did, since the model was loaded; None without `step_graph=`.
    """

    hits: int
    misses: int
    evictions: int
    bytes_read: int
    read_stall_s: float
    read_retries: int
    direct_io: bool
    moe_steps: int
    moe_s: float
    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float
    slots: int
    slots_planned: int
    fused: dict[str, int]
    policy: str = "LruPolicy"
    scheduler: str = "auto"
    predictor: str | None = None
    prefetching: bool = False
    prefetches_issued: int = 0
    prefetches_used: int = 0
    prefetches_late: int = 0
    prefetches_wasted: int = 0
    late_stall_s: float = 0.0
    skills: tuple[Skill, ...] = ()
    accelerator: AcceleratorStatistics | None = None
    kv: KvStatistics | None = None
    prefix: PrefixStatistics | None = None
    graphs: GraphFigures | None = None

    @property
    def hit_rate(self) -> float:
        """Hits / (hits + misses); 0 before the first step."""
        routed = self.hits + self.misses
        return self.hits / routed if routed else 0.0

    @property
    def stall_s_by_cause(self) -> dict[str, float]:
        """`read_stall_s` by what was waited for: reads that began too late, and reads that nobody foresaw."""
        return {"read ahead too late": self.late_stall_s, "not read ahead": self.read_stall_s - self.late_stall_s}

    @property
    def decode_tokens_per_s(self) -> float:
        """Decode speed; 0 where nothing was decoded."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prefill speed; 0 where nothing was prefilled."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All figures, the derived ones too."""
        return {
            **asdict(self),
            "hit_rate": self.hit_rate,
            "stall_s_by_cause": self.stall_s_by_cause,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
        }

    def __str__(self) -> str:
        reads = "" if self.direct_io else ", buffered reads"
        kv = ""
        if self.kv is not None:
            above = f"{format_size(self.kv.vram_nbytes)} in VRAM, " if self.kv.vram_budget_nbytes else ""
            waited = self.kv.read_stall_s + self.kv.write_stall_s + self.kv.move_stall_s
            kv = (
                f", KV cache {above}{format_size(self.kv.ram_nbytes)} in RAM and {format_size(self.kv.disk_nbytes)} on "
                f"disk, waited {waited:.2f} s for it"
            )
            if self.kv.sparsity is not None:
                kv += f", {self.kv.sparsity}"
        experts = streamed = ""
        if self.slots_planned:
            experts = (
                f", hit rate {self.hit_rate:.1%} ({self.hits} of {self.hits + self.misses}), "
                f"read {format_size(self.bytes_read)}, waited {self.read_stall_s:.2f} s for reads{reads}"
            )
        if self.accelerator is not None and self.accelerator.dense_bytes_copied:
            streamed = f", {format_size(self.accelerator.dense_bytes_copied)} of dense weights streamed"
        return (
            f"decode {self.decode_tokens_per_s:.2f} tokens/s ({self.decode_tokens}), "
            f"prefill {self.prefill_tokens_per_s:.1f} tokens/s ({self.prefill_tokens}){experts}{streamed}{kv}"
        )
