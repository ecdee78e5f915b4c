"""Some experts of a model in RAM: cache policy and reading ahead against plain LRU.

The models are the trained tiny one with widened experts, and one that is drawn by chance with published statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from transformers import AutoTokenizer, DynamicCache

import offload
from benchmarks.checkpoints import budget_for, store_root
from benchmarks.disk import expert_blocks
from benchmarks.drawn_model import DrawnModel, ensure_drawn
from benchmarks.equality import gate_same_bits
from benchmarks.harness import Report, Row, Spread, interleave, ratios, say
from benchmarks.read_contention import contention
from benchmarks.trace_recording import MODEL
from benchmarks.widened_model import ensure_widened
from examples.tiny_moe.corpus import read_documents
from prefetch.policies.base import CachePolicy
from prefetch.policies.named import make_policy
from prefetch.traces.replay import belady_for
from prefetch.traces.stall import Pace, replay_stalls
from prefetch.traces.trace import RoutingTrace

CONTEXT_TOKENS = 1024
PLAIN, SCHEDULED, ALL = "plain LRU", "LRU, scheduled", "everything on"
ORACLE = "policy, one layer known"
RUNS: dict[str, dict[str, Any]] = {
    PLAIN: {"policy": "lru", "prefetch": False, "scheduler": "off"},
    SCHEDULED: {"policy": "lru", "prefetch": False},
    "policy": {"policy": "auto", "prefetch": False},
    "reading ahead": {"policy": "lru", "prefetch": True},
    "policy, reading ahead always": {"policy": "auto", "prefetch": True},
    ALL: {"policy": "auto", "prefetch": "auto"},
}


@dataclass(frozen=True)
class PrefetchScale:
    """How much to decode.

    Attributes:
        widths: how many times as wide as trained experts are, in turn.
        drawn: models that are drawn, and measured after them.
        shares: of the experts that fit.
        turn_tokens: decoded in a turn.
        drawn_turn_tokens: likewise, of models that are drawn.
        warm_tokens: decoded before; as many as the controller's shortest trial takes.
        drawn_warm_tokens: likewise, of models that are drawn; as most of its trials take there.
        rounds: turns of each.
        contention_nbytes: read beside computing threads, at most all experts.
    """

    widths: tuple[int, ...]
    drawn: tuple[DrawnModel, ...]
    shares: tuple[float, ...]
    turn_tokens: int
    drawn_turn_tokens: int
    warm_tokens: int
    drawn_warm_tokens: int
    rounds: int
    contention_nbytes: int


_DRAWN = DrawnModel(), replace(DrawnModel(), intermediate=768, heads=48)
"""The second has experts of 4.7 MB, as Qwen3-30B-A3B has in 8 bits and DeepSeek-V2-Lite in 4, and as many times more of
what every token needs."""
FULL = PrefetchScale((8, 4), _DRAWN, (0.25, 0.5), 48, 16, 96, 240, 15, 150 << 20)
QUICK = PrefetchScale((1,), (DrawnModel(2, 8, 2, 64, 32, 2, 32, 64),), (0.25,), 8, 8, 8, 8, 2, 1 << 20)

BALANCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5)
"""Seconds of a read over a layer's computation."""

EXPERTS_SHARES = (0.3, 0.7)
"""Of a layer's computation, what waits for its experts."""


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
    moe_ms: float
    reading_ms: float
    read_nbytes: float

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Of reads, while there were any."""
        return 1e3 * self.read_nbytes / self.reading_ms if self.reading_ms else inf


class Run:
    """A model that reads a text, token by token."""

    def __init__(self, name: str, share: float, checkpoint: Path, work: Path, tokens: list[int]) -> None:
        ram = budget_for(checkpoint, share, CONTEXT_TOKENS)
        self.model = offload.load(
            checkpoint, ram=ram, nvme=store_root(work), context=CONTEXT_TOKENS, progress=False, **RUNS[name]
        )
        self.runtime = cast(Any, self.model.offload)
        self._tokens = tokens
        self.restart()
        self.logits = torch.empty(0)

    def restart(self) -> None:
        """Begin the text again; what was learnt stays."""
        self._cache = DynamicCache(config=self.model.config)
        self._at = 0

    def close(self) -> None:
        """Keep nothing that was learnt: the next run begins as this one did."""
        self.runtime.learners = {}
        self.runtime.close()

    @torch.no_grad()
    def decode(self, count: int) -> Turn:
        """Go on with the text."""
        self.runtime.reset_stats()
        engine = self.runtime.tier.engine
        read_before_s, before = engine.reading_s, perf_counter()
        for token in self._tokens[self._at : self._at + count]:
            found = self.model(input_ids=torch.tensor([[token]]), past_key_values=self._cache, use_cache=True)
            self.logits = found.logits[0, -1]
        seconds = perf_counter() - before
        self._at += count
        stats = self.runtime.stats()
        each = [figure / count for figure in (stats.prefetches_issued, stats.prefetches_used, stats.prefetches_wasted)]
        ms = [1e3 * figure / count for figure in (stats.read_stall_s, stats.late_stall_s)]
        moe_ms = 1e3 * stats.moe_s / count
        reading_ms = 1e3 * (engine.reading_s - read_before_s) / count
        read_nbytes = stats.bytes_read / count
        return Turn(
            count / seconds, ms[0], ms[1], stats.hit_rate, each[0], each[1], each[2], moe_ms, reading_ms, read_nbytes
        )


def run(work: Path, scale: PrefetchScale) -> Report:
    """The benchmark."""
    report = Report("prefetch")
    text = _text(scale.warm_tokens + scale.rounds * scale.turn_tokens)
    for width in scale.widths:
        _measure_model(report, f"x{width}", ensure_widened(work, width), work, scale, text, scale.warm_tokens)
    walk = list(range(scale.drawn_warm_tokens + scale.rounds * scale.drawn_turn_tokens))
    for model in scale.drawn:
        _measure_model(report, model.name, ensure_drawn(work, model), work, scale, walk, scale.drawn_warm_tokens)
    report.notes.append(
        "Held-out Python source, decoded token by token with direct reads, with policies and predictors that start "
        "anew. Plain LRU has all parts off: no reading ahead, and experts computed in turn; scheduled, those in RAM "
        "while others are read. Experts are so many times as wide as trained and compute the same. Drawn models are "
        "synthetic and read a walk. Figures of reads ahead, and stalls are for a token. With everything on, a "
        "controller switches reading ahead off where passes take no less time with it."
    )
    return report


def _measure_model(
    report: Report,
    name: str,
    checkpoint: Path,
    work: Path,
    scale: PrefetchScale,
    tokens: list[int],
    warm_tokens: int,
) -> None:
    rows = contention(*expert_blocks(work, checkpoint, scale.contention_nbytes), rounds=scale.rounds)
    report.tables.setdefault("Reading beside computing", []).extend({"model": name, **row} for row in rows)
    for share in scale.shares:
        say(f"decoding with {share:.0%} of the experts of {name} in RAM")
        _measure(report, f"{name}, {share:.0%}", share, checkpoint, work, scale, tokens, warm_tokens)


def _text(count: int) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    found: list[int] = []
    for document in read_documents():
        if document.held_out and document.name.endswith(".py"):
            found += tokenizer(document.text[: 8 * count])["input_ids"]
        if len(found) >= count:
            break
    return found[:count]


def _measure(
    report: Report,
    cell: str,
    share: float,
    checkpoint: Path,
    work: Path,
    scale: PrefetchScale,
    tokens: list[int],
    warm_tokens: int,
) -> None:
    turn_tokens = (len(tokens) - warm_tokens) // scale.rounds
    with ExitStack() as stack:
        runs = {}
        for name in RUNS:
            runs[name] = Run(name, share, checkpoint, work, tokens)
            stack.callback(runs[name].close)
        interleave({name: partial(one.decode, warm_tokens) for name, one in runs.items()}, 1)
        turns = interleave({name: partial(one.decode, turn_tokens) for name, one in runs.items()}, scale.rounds)
        gate_same_bits(report, f"last logits, {cell}", {name: one.logits.float().numpy() for name, one in runs.items()})
        for one in runs.values():
            one.runtime.check()
        # All runs have this routing; those that are timed do not record it.
        trace = _routing(runs[PLAIN], tokens)
        report.tables.setdefault("Routing", []).append({"cell": cell, **_locality(trace)})
        balances = _balances(trace, runs[ALL], warm_tokens)
        limits = _limits(trace, runs[ALL], turns[ALL], warm_tokens)
        skills = runs["policy, reading ahead always"].runtime.stats().skills
    plain, scheduled = ([turn.tokens_per_s for turn in turns[name]] for name in (PLAIN, SCHEDULED))
    for name, found in turns.items():
        report.tables.setdefault("Decode from disk", []).append(_row(cell, name, found, plain, scheduled))
    for name, limit in limits.items():
        report.tables.setdefault("What an oracle would leave, from the run's trace", []).append(
            {"cell": cell, "oracle": name, **limit}
        )
    for name in (SCHEDULED, "policy"):
        report.tables.setdefault("Were all reading behind computing", []).append(
            {"cell": cell, "reads of": name, **_overlapped(turns[SCHEDULED], turns[name])}
        )
    for row in balances:
        limited = report.tables.setdefault("Over plain LRU, reads free of computing", [])
        limited.append({"cell": cell, **row})
    for skill in skills:
        report.tables.setdefault("Recall among the k most probable, which is precision; combined among 2 k", []).append(
            {"cell": cell, **asdict(skill)}
        )
    speed = ratios([turn.tokens_per_s for turn in turns[ALL]], plain)
    report.target(f"{cell}: everything on / plain LRU, tokens/s", speed.median, "at least", 1.5)
    off = [turn.tokens_per_s for turn in turns["policy"]]
    never = ratios([turn.tokens_per_s for turn in turns[ALL]], off).median
    report.target(f"{cell}: everything on / policy without reading ahead", never, "at least", 1.0)
    stall_ms = Spread.of([turn.stall_ms for turn in turns[ALL]]).median
    oracle_ms = float(str(limits[ORACLE]["stall ms"]))
    report.target(f"{cell}: stall / one-layer oracle's", stall_ms / max(oracle_ms, 1e-9), "at most", 1.1)


def _routing(one: Run, tokens: list[int]) -> RoutingTrace:
    """The routing of the text, from its start on."""
    one.runtime.record_trace()
    one.restart()
    one.decode(len(tokens))
    trace: RoutingTrace = one.runtime.trace()
    return trace


def _locality(trace: RoutingTrace) -> Row:
    """How much of a token's routing the token before had."""
    chosen = trace.experts.reshape(trace.passes, trace.geometry.layers, trace.top_k)
    again = (chosen[1:, :, :, None] == chosen[:-1, :, None, :]).any(-1).mean()
    return {"layers": trace.geometry.layers, "experts": trace.geometry.counts[0], "of the token before": float(again)}


def _limits(trace: RoutingTrace, one: Run, turns: list[Turn], warm_passes: int) -> dict[str, Row]:
    """What knowledge of the future would leave, at this run's pace, that of its reads included."""
    runtime = one.runtime
    pass_ms = Spread.of([1e3 / turn.tokens_per_s - turn.stall_ms for turn in turns]).median
    moe_ms = Spread.of([turn.moe_ms - turn.stall_ms for turn in turns]).median
    bandwidth = Spread.of([turn.bandwidth_bytes_per_s for turn in turns]).median
    layers = trace.geometry.layers
    pace = Pace(runtime.layers[0].layout.nbytes / bandwidth, moe_ms / 1e3 / layers, (pass_ms - moe_ms) / 1e3 / layers)
    slots = runtime.tier.table.usable_slots
    policies: dict[str, tuple[Callable[[], CachePolicy], int]] = {
        "LRU, nothing known": (lambda: make_policy("lru", trace.geometry), 0),
        "policy, nothing known": (lambda: make_policy("auto", trace.geometry), 0),
        ORACLE: (lambda: make_policy("auto", trace.geometry), 1),
        "Belady, one layer known": (lambda: belady_for(trace), 1),
        "Belady, a pass known": (lambda: belady_for(trace), layers),
    }
    found: dict[str, Row] = {}
    for name, (make, known) in policies.items():
        stalls = replay_stalls(trace, make(), slots, pace, oracle_layers=known, warm_passes=warm_passes)
        found[name] = {
            "stall ms": 1e3 * stalls.stall_s / stalls.tokens,
            "reads": stalls.reads / stalls.tokens,
            "disk ms": 1e3 * pace.read_s * stalls.reads / stalls.tokens,
            "compute ms": pass_ms,
            "tokens/s": stalls.tokens / stalls.seconds,
        }
    return found


def _balances(trace: RoutingTrace, one: Run, warm_passes: int) -> list[Row]:
    """What an oracle of one layer reaches over plain LRU at most, whatever reads and computation take."""
    slots = one.runtime.tier.table.usable_slots

    def seconds(policy: CachePolicy, pace: Pace, known: int) -> float:
        return replay_stalls(trace, policy, slots, pace, oracle_layers=known, warm_passes=warm_passes).seconds

    rows: list[Row] = []
    for share in EXPERTS_SHARES:
        for balance in BALANCES:
            pace = Pace(balance, share, 1.0 - share)
            plain = seconds(make_policy("lru", trace.geometry), pace, 0)
            rows.append(
                {
                    "read / layer": balance,
                    "experts / layer": share,
                    "policy": plain / seconds(make_policy("auto", trace.geometry), pace, 0),
                    ORACLE: plain / seconds(make_policy("auto", trace.geometry), pace, 1),
                    "Belady, one layer known": plain / seconds(belady_for(trace), pace, 1),
                }
            )
    return rows


def _overlapped(plain: list[Turn], turns: list[Turn]) -> Row:
    """What LRU would gain if these reads, as long as they took, all fell into its computing, or the other way."""
    pass_ms = Spread.of([1e3 / turn.tokens_per_s for turn in plain]).median
    compute_ms = Spread.of([1e3 / turn.tokens_per_s - turn.stall_ms for turn in plain]).median
    reading_ms = Spread.of([turn.reading_ms for turn in turns]).median
    return {
        "compute ms": compute_ms,
        "reads in flight ms": reading_ms,
        "over LRU, at most": pass_ms / max(compute_ms, reading_ms),
    }


def _row(cell: str, name: str, turns: list[Turn], plain: list[float], scheduled: list[float]) -> Row:
    speeds = [turn.tokens_per_s for turn in turns]
    return {
        "cell": cell,
        "runs": name,
        "tokens/s": Spread.of(speeds),
        "/ plain": ratios(speeds, plain),
        "/ scheduled": ratios(speeds, scheduled),
        "stall ms": Spread.of([turn.stall_ms for turn in turns]),
        "of it late ms": Spread.of([turn.late_stall_ms for turn in turns]).median,
        "experts ms": Spread.of([turn.moe_ms - turn.stall_ms for turn in turns]).median,
        "disk idle": Spread.of([1.0 - turn.reading_ms * turn.tokens_per_s / 1e3 for turn in turns]).median,
        "MB read": Spread.of([turn.read_nbytes / 1e6 for turn in turns]).median,
        "hit rate": Spread.of([turn.hit_rate for turn in turns]).median,
        "read ahead": Spread.of([turn.issued for turn in turns]).median,
        "used": Spread.of([turn.used for turn in turns]).median,
        "wasted": Spread.of([turn.wasted for turn in turns]).median,
    }
