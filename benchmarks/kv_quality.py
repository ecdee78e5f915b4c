"""What the trained example models lose with every format of the KV cache: perplexity, and what one recalls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, DynamicCache

import offload
from benchmarks.harness import Report, Row, say
from benchmarks.kv_recall import RecallScale, recalled
from benchmarks.quality import MODEL, WINDOW_TOKENS, held_out_windows
from offload.runtime import Runtime

CHUNK_TOKENS = 32
"""Tokens of a pass: all but the newest 128 before them are read from packed blocks."""

BATCH = 8
SAME = 1e-5


@dataclass(frozen=True)
class KvQualityScale:
    """How much is read.

    Attributes:
        windows: of held-out text.
        formats: of the KV cache.
        recall: questions that are asked.
        fillers: kinds of filler between facts.
    """

    windows: int
    formats: tuple[str, ...]
    recall: RecallScale
    fillers: tuple[int, ...]


FULL = KvQualityScale(32, ("fp32", "bf16", "fp8", "int8", "int4"), RecallScale(8192, 11, 20), (4, 32))
QUICK = KvQualityScale(8, ("fp32", "int8", "int4"), RecallScale(1024, 1, 10), (4,))


def run(work: Path, scale: KvQualityScale) -> Report:
    """Gate blocks in the model's own dtype on a cache without blocks, then compare formats with it."""
    report = Report("kv_quality")
    windows = held_out_windows(AutoTokenizer.from_pretrained(MODEL), scale.windows)
    say("perplexity without blocks")
    base = _perplexity(work, windows)
    for format in scale.formats:
        say(f"perplexity in {format}")
        # Where prefixes may be saved, the cache lies in blocks even if it would fit without.
        found = _perplexity(work, windows, kv=format, prefix_cache=1)
        if format == "fp32":
            off = abs(found / base - 1)
            report.gate("perplexity in blocks = without", off <= SAME, f"{off:.1e} apart, tolerance {SAME:.0e}")
        report.tables.setdefault("Perplexity, model in fp32", []).append(
            {"kv": format, "perplexity": round(found, 5), "change %": round(100 * (found / base - 1), 4)}
        )
    _recall(report, work, scale)
    report.notes.append(
        f"{windows.shape[0] * WINDOW_TOKENS} tokens of held-out text of examples/tiny_moe in windows of "
        f"{WINDOW_TOKENS}, {CHUNK_TOKENS} tokens a pass; all but the newest 128 before them lie in packed blocks"
    )
    return report


def _recall(report: Report, work: Path, scale: KvQualityScale) -> None:
    for format in scale.formats:
        row: Row = {"kv": format}
        for fillers in scale.fillers:
            say(f"recall in {format}, {fillers} kinds of filler")
            found, _ = recalled(work, scale.recall, fillers, kv=format, prefix_cache=1)
            row[f"% right, {fillers} kinds of filler"] = round(100 * found.accuracy, 2)
        report.tables.setdefault("Recall, model in fp32", []).append(row)
    recall = scale.recall
    report.notes.append(
        f"examples/tiny_recall: {recall.contexts} contexts of {recall.tokens} tokens with {recall.facts} facts each, "
        "all of which are asked for after them"
    )


@torch.no_grad()
def _perplexity(work: Path, windows: torch.Tensor, **kv: Any) -> float:
    model = offload.load(
        MODEL, ram="2GiB", nvme=work / "quality-store", context=WINDOW_TOKENS, batch=BATCH, dtype="float32",
        progress=False, **kv,
    )  # fmt: skip
    loss = 0.0
    with cast("Runtime", model.offload):
        for batch in windows.split(BATCH):
            cache = DynamicCache(config=model.config)
            for start in range(0, WINDOW_TOKENS, CHUNK_TOKENS):
                ids = batch[:, start : start + CHUNK_TOKENS]
                logits = model(ids, past_key_values=cache, use_cache=True).logits.float()
                following = batch[:, start + 1 : start + CHUNK_TOKENS + 1]
                loss += F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum").item()
    return math.exp(loss / windows[:, 1:].numel())
