"""Hit rates that plans predict from a recorded trace, beside those of the runtime on other text of the same kind.

The trained tiny model reads one half of a text while its routing is recorded, and the other half with few slots and a
policy that knows nothing of runs before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import numpy as np
import torch
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel

import offload
from benchmarks.harness import Report, Row, say
from benchmarks.trace_recording import MODEL
from examples.tiny_moe.corpus import read_documents
from offload.runtime import Runtime
from placement.kept_hits import kept_hits
from placement.policy_hits import policy_hits
from placement.routing import HitCurve
from placement.trace_analysis import decode_hits, fit_popularity
from prefetch.traces.trace import RoutingTrace

_CONTEXT_TOKENS = 1024


@dataclass(frozen=True)
class TraceHitsScale:
    """How much is read.

    Attributes:
        prompt: tokens of each prompt.
        new: tokens that are decoded after it, of which the second half counts.
        shares: of the experts, that have a slot.
    """

    prompt: int
    new: int
    shares: tuple[float, ...]


FULL = TraceHitsScale(64, 448, (0.1, 0.25, 0.5, 0.75))
QUICK = TraceHitsScale(16, 24, (0.25,))


def run(scale: TraceHitsScale) -> Report:
    """The benchmark."""
    report = Report("trace_hits")
    rows: list[Row] = []
    errors: dict[str, list[float]] = {name: [] for name in ("replayed", "LRU", "popularity")}
    for kind, recorded, read in _texts(scale):
        say(f"{kind}: recording")
        trace = _recorded(recorded, scale.prompt)
        layers = tuple((count, trace.top_k) for count in trace.geometry.counts)
        curves: dict[str, HitCurve] = {
            "replayed": policy_hits(trace),
            "LRU": decode_hits(trace),
            "popularity": kept_hits(layers, fit_popularity(trace), 1),
        }
        for share in scale.shares:
            slots = round(share * trace.geometry.total)
            say(f"{kind}: {slots} slots")
            measured = _measured(read, scale.prompt, slots)
            row: Row = {"text": kind, "experts with a slot": f"{share:.0%}", "measured": measured}
            for name, curve in curves.items():
                told = float(curve.rate(np.array([float(slots)]))[0])
                errors[name].append(abs(told - measured))
                row[name] = told
            rows.append(row)
    report.tables["Hit rates of decode"] = rows
    for name, found in errors.items():
        report.notes.append(f"{name}: off by {np.mean(found):.3f} on average, {max(found):.3f} at most")
    report.target("from a replay, off on average", float(np.mean(errors["replayed"])), "at most", 0.02)
    return report


def _texts(scale: TraceHitsScale) -> Iterator[tuple[str, list[int], list[int]]]:
    """(kind, tokens that are recorded, tokens that are read later), both of held-out documents."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    held_out = [document for document in read_documents() if document.held_out]
    kinds = {
        "Python source": [document.text for document in held_out if document.name.endswith(".py")],
        "documentation": [document.text for document in held_out if document.name.startswith("topics/")],
    }
    length = scale.prompt + scale.new
    for kind, texts in kinds.items():
        random.Random(0).shuffle(texts)
        tokens: list[int] = []
        for text in texts:
            tokens += tokenizer(text[: 16 * length])["input_ids"][:length]
        if len(tokens) < 2 * length:
            raise ValueError(f"{len(tokens)} tokens of held-out {kind}, {2 * length} wanted")
        yield kind, tokens[:length], tokens[length : 2 * length]


def _recorded(tokens: list[int], prompt: int) -> RoutingTrace:
    model, runtime, store = _loaded(None)
    with store, runtime:
        runtime.record_trace()
        _read(model, tokens, prompt)
        trace: RoutingTrace = runtime.trace()
        return trace


def _measured(tokens: list[int], prompt: int, slots: int) -> float:
    """The hit rate of the second half of decode."""
    model, runtime, store = _loaded(slots)
    with store, runtime:
        cache = _read(model, tokens[: (prompt + len(tokens)) // 2], prompt)
        runtime.reset_stats()
        _read(model, tokens[(prompt + len(tokens)) // 2 :], 0, cache)
        rate = runtime.stats().hit_rate
        assert rate is not None
        return rate


def _loaded(slots: int | None) -> tuple[PreTrainedModel, Runtime, TemporaryDirectory[str]]:
    """With so many slots, None for all; the store is new, and so is what policies know."""
    whole = offload.plan(MODEL, ram="1GiB", context=_CONTEXT_TOKENS)
    ram = whole.peak_ram_nbytes
    if slots is not None:
        ram += (slots - whole.ram_slots) * whole.slot_nbytes
    store = TemporaryDirectory()
    model = offload.load(MODEL, ram=ram, nvme=Path(store.name), context=_CONTEXT_TOKENS, progress=False)
    runtime = cast("Runtime", model.offload)
    if slots is not None and runtime.plan.ram_slots != slots:
        raise ValueError(f"{runtime.plan.ram_slots} slots instead of {slots}")
    return model, runtime, store


@torch.no_grad()
def _read(model: PreTrainedModel, tokens: list[int], prompt: int, cache: DynamicCache | None = None) -> DynamicCache:
    """A prompt in one pass, and what follows token by token."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    pieces = [tokens[:prompt]] * (prompt > 0) + [[token] for token in tokens[prompt:]]
    for piece in pieces:
        model(input_ids=torch.tensor([piece]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache
