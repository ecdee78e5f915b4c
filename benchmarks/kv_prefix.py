"""Time to the first token of a prompt whose prefix was saved, beside computing it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch

import offload
from benchmarks import checkpoints
from benchmarks.harness import Report, Spread, ratios, say
from offload.runtime import Runtime

TARGET_SHARE = 0.1
_QUESTION_TOKENS = 32


@dataclass(frozen=True)
class PrefixScale:
    """How much is measured.

    Attributes:
        prefix_tokens: of the prefix that prompts share.
        formats: of the KV cache.
        rounds: prompts that begin with it, each in a freshly loaded model.
    """

    prefix_tokens: int
    formats: tuple[str, ...]
    rounds: int


FULL = PrefixScale(16384, ("int8",), 3)
QUICK = PrefixScale(192, ("int8",), 2)


def run(work: Path, shape: checkpoints.Shape, scale: PrefixScale) -> Report:
    """The benchmark."""
    report = Report("kv_prefix")
    checkpoint = checkpoints.ensure_checkpoint(shape, work)
    root = checkpoints.store_root(work)
    context = scale.prefix_tokens + 2 * _QUESTION_TOKENS
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocab, (1, scale.prefix_tokens + _QUESTION_TOKENS), generator=generator)
    for format in scale.formats:
        shutil.rmtree(root / "prefixes", ignore_errors=True)
        load = partial(
            offload.load, checkpoint, nvme=root, context=context, kv=format, prefix_cache="8GiB", progress=False
        )
        say(f"computing {scale.prefix_tokens} tokens, {format}")
        model = load()
        with cast("Runtime", model.offload) as runtime:
            expected, computed = _first_token(model, ids)
            before = perf_counter()
            path = runtime.save_prefix(ids[:, : scale.prefix_tokens])
            saving = perf_counter() - before - computed
        reused = []
        for _ in range(scale.rounds):
            model = load()
            with cast("Runtime", model.offload) as runtime:
                found, seconds = _first_token(model, ids)
                detail = f"token {found}, expected {expected}"
                report.gate(f"{format}: the token that computing gives", found == expected, detail)
                used = runtime.stats().prefix
                assert used is not None
                detail = f"{used.reused_tokens} tokens"
                report.gate(f"{format}: the prefix is reused", used.reused_tokens == scale.prefix_tokens, detail)
            reused.append(seconds)
        share = ratios(reused, [computed] * len(reused))
        report.tables.setdefault(f"A prefix of {scale.prefix_tokens} tokens", []).append(
            {
                "kv": format,
                "file MB": path.stat().st_size / 1e6,
                "computed, s": computed,
                "reused, s": Spread.of(reused),
                "share": share,
                "writing beside computing, s": saving,
            }
        )
        report.target(f"{format}: time to first token, share of computing", share.median, "at most", TARGET_SHARE)
    shutil.rmtree(root / "prefixes", ignore_errors=True)
    report.notes.append(
        f"{shape.layers} layer(s), {shape.kv_heads} key-value heads of {shape.head_dim}; {_QUESTION_TOKENS} tokens "
        "follow the prefix; every reuse in a model loaded anew. The file may be in the page cache."
    )
    return report


def _first_token(model: Any, ids: torch.Tensor) -> tuple[int, float]:
    before = perf_counter()
    out = model.generate(ids, max_new_tokens=1, do_sample=False)
    return int(out[0, -1]), perf_counter() - before
