"""The trained tiny model with a share of its experts in RAM: cache policy and reading ahead against plain LRU."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache

import offload
from benchmarks.checkpoints import budget_for, store_root
from benchmarks.equality import gate_same_bits
from benchmarks.harness import Report, Row, Spread, interleave, ratios, say
from benchmarks.trace_recording import MODEL
from examples.tiny_moe.corpus import read_documents

CONTEXT_TOKENS = 1024
PLAIN, ALL = "LRU", "everything on"
RUNS: dict[str, dict[str, Any]] = {
    PLAIN: {"policy": "lru", "prefetch": False},
    "policy": {"policy": "auto", "prefetch": False},
    "reading ahead": {"policy": "lru", "prefetch": True},
    "policy, reading ahead always": {"policy": "auto", "prefetch": True},
    ALL: {"policy": "auto", "prefetch": "auto"},
}


@dataclass(frozen=True)
class PrefetchScale:
    """How much to decode.

    Attributes:
        shares: of the experts that fit.
        turn_tokens: decoded in a turn.
        warm_tokens: decoded before; as many as the controller's trial takes.
        rounds: turns of each.
    """

    shares: tuple[float, ...]
    turn_tokens: int
    warm_tokens: int
    rounds: int


FULL = PrefetchScale((0.25, 0.5), 64, 64, 7)
QUICK = PrefetchScale((0.25,), 8, 8, 2)


@dataclass(frozen=True)
class Turn:
    """One run's turn, per token where it says so."""

    tokens_per_s: float
    stall_ms: float
    late_stall_ms: float
    hit_rate: float
    issued: float
    used: float
    wasted: float


class Run:
    """A model that reads a text, token by token."""

    def __init__(self, name: str, share: float, work: Path, tokens: list[int]) -> None:
        ram = budget_for(MODEL, share, CONTEXT_TOKENS)
        self.model = offload.load(
            MODEL, ram=ram, nvme=store_root(work), context=CONTEXT_TOKENS, progress=False, **RUNS[name]
        )
        self.runtime: Any = self.model.offload
        self._cache = DynamicCache(config=self.model.config)
        self._tokens = tokens
        self._at = 0
        self.logits = torch.empty(0)

    @torch.no_grad()
    def decode(self, count: int) -> Turn:
        """Go on with the text."""
        self.runtime.reset_stats()
        before = perf_counter()
        for token in self._tokens[self._at : self._at + count]:
            found = self.model(input_ids=torch.tensor([[token]]), past_key_values=self._cache, use_cache=True)
            self.logits = found.logits[0, -1]
        seconds = perf_counter() - before
        self._at += count
        stats = self.runtime.stats()
        each = [figure / count for figure in (stats.prefetches_issued, stats.prefetches_used, stats.prefetches_wasted)]
        ms = [1e3 * figure / count for figure in (stats.read_stall_s, stats.late_stall_s)]
        return Turn(count / seconds, ms[0], ms[1], stats.hit_rate, each[0], each[1], each[2])


def run(work: Path, scale: PrefetchScale) -> Report:
    """The benchmark."""
    report = Report("prefetch")
    tokens = _text(scale.warm_tokens + scale.rounds * scale.turn_tokens)
    for share in scale.shares:
        say(f"decoding with {share:.0%} of the experts")
        _measure(report, share, work, scale, tokens)
    report.notes.append(
        "Held-out Python source, decoded token by token with direct reads. Experts of 197 kB. Figures of reads ahead, "
        "and stalls are for a token. With everything on, a controller switches reading ahead off where passes take no "
        "less time with it."
    )
    return report


def _text(count: int) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    found: list[int] = []
    for document in read_documents():
        if document.held_out and document.name.endswith(".py"):
            found += tokenizer(document.text[: 8 * count])["input_ids"]
        if len(found) >= count:
            break
    return found[:count]


def _measure(report: Report, share: float, work: Path, scale: PrefetchScale, tokens: list[int]) -> None:
    with ExitStack() as stack:
        runs = {name: Run(name, share, work, tokens) for name in RUNS}
        for one in runs.values():
            stack.enter_context(one.runtime)
        interleave({name: partial(one.decode, scale.warm_tokens) for name, one in runs.items()}, 1)
        turns = interleave({name: partial(one.decode, scale.turn_tokens) for name, one in runs.items()}, scale.rounds)
        gate_same_bits(
            report, f"last logits, {share:.0%}", {name: one.logits.float().numpy() for name, one in runs.items()}
        )
        for one in runs.values():
            one.runtime.check()
    plain = [turn.tokens_per_s for turn in turns[PLAIN]]
    for name, found in turns.items():
        report.tables.setdefault("Decode from disk", []).append(_row(share, name, found, plain))
    speed = ratios([turn.tokens_per_s for turn in turns[ALL]], plain)
    report.target(f"{share:.0%}: everything on / plain LRU, tokens/s", speed.median, "at least", 1.5)


def _row(share: float, name: str, turns: list[Turn], plain: list[float]) -> Row:
    return {
        "cached": f"{share:.0%}",
        "runs": name,
        "tokens/s": Spread.of([turn.tokens_per_s for turn in turns]),
        "/ LRU": ratios([turn.tokens_per_s for turn in turns], plain),
        "stall ms": Spread.of([turn.stall_ms for turn in turns]),
        "of it late ms": Spread.of([turn.late_stall_ms for turn in turns]).median,
        "hit rate": Spread.of([turn.hit_rate for turn in turns]).median,
        "read ahead": Spread.of([turn.issued for turn in turns]).median,
        "used": Spread.of([turn.used for turn in turns]).median,
        "wasted": Spread.of([turn.wasted for turn in turns]).median,
    }
