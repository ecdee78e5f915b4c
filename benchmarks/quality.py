"""Perplexity of the trained example model on held-out text in every format, through the runtime."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import offload
from benchmarks.harness import Report, say
from examples.tiny_moe.corpus import encode, read_documents
from offload.runtime import Runtime
from placement.plan import Plan

MODEL = Path(__file__).resolve().parents[1] / "examples" / "tiny_moe" / "model"
WINDOW_TOKENS = 512
BATCH = 8

SAME = 1e-5
"""Share by which the runtime's perplexity without quantisation may be off transformers': fp32 in another order."""

_TARGETS_PERCENT = {"int8": 0.1, "int4": 2.0}

Quant = str | dict[str, str | None] | None

SETTINGS: dict[str, Quant] = {
    "bf16": None,
    "int8": "int8",
    "int4": "int4",
    "mxfp4": "mxfp4",
    "fp8_e4m3": "fp8_e4m3",
    "int4, experts only": {"experts": "int4"},
    "int4, dense only": {"dense": "int4"},
    "int4, output layer only": {"lm_head": "int4"},
    "int4 everywhere": {"experts": "int4", "dense": "int4", "lm_head": "int4"},
    "mxfp4, experts only": {"experts": "mxfp4"},
}


@dataclass(frozen=True)
class QualityScale:
    """How much is read: windows of held-out text, and which of SETTINGS."""

    windows: int
    settings: tuple[str, ...] = tuple(SETTINGS)


FULL = QualityScale(windows=48)
QUICK = QualityScale(windows=8, settings=("bf16", "int8", "int4"))


def run(work: Path, scale: QualityScale) -> Report:
    """Gate the model without quantisation on transformers, then compare formats with it."""
    report = Report("quality")
    windows = held_out_windows(_tokenizer(), scale.windows)
    _gate(report, work, windows[:BATCH])
    base = math.nan
    for name in scale.settings:
        say(f"perplexity in {name}")
        found, plan = _run(work, windows, quant=SETTINGS[name])
        if SETTINGS[name] is None:
            base = found
        change = 100 * (found / base - 1)
        report.tables.setdefault("Perplexity", []).append(
            {
                "quant": name,
                "experts": plan.format,
                "dense": plan.dense_format,
                "lm_head": plan.head_format,
                "perplexity": round(found, 4),
                "change %": round(change, 3),
                "expert MB": round(plan.expert_nbytes / 1e6, 2),
                "dense MB": round(plan.ram.dense_nbytes / 1e6, 2),
            }
        )
        if name in _TARGETS_PERCENT:
            report.target(f"perplexity in {name} over bf16, change in %", change, "at most", _TARGETS_PERCENT[name])
    report.notes.append(
        f"{windows.shape[0] * WINDOW_TOKENS} tokens of held-out text of examples/tiny_moe in windows of "
        f"{WINDOW_TOKENS}; a trained model of 11 M parameters with tied embeddings, hidden 256, "
        "16 experts of 128, top-4"
    )
    return report


def _gate(report: Report, work: Path, windows: torch.Tensor) -> None:
    """In fp32: rounding to bf16 in another order moves the perplexity of few tokens by a tenth of a percent."""
    say("perplexity by transformers")
    expected = _perplexity(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval(), windows)
    found, _ = _run(work, windows, dtype="float32")
    difference = abs(found / expected - 1)
    detail = f"{found:.6f} and {expected:.6f} in fp32, {difference:.1e} apart, tolerance {SAME:.0e}"
    report.gate("perplexity without quantisation: runtime = transformers", difference <= SAME, detail)


def _run(work: Path, windows: torch.Tensor, *, quant: Quant = None, dtype: str = "auto") -> tuple[float, Plan]:
    model = offload.load(
        MODEL, ram="2GiB", nvme=work / "quality-store", context=WINDOW_TOKENS, batch=BATCH, quant=quant, dtype=dtype,
        progress=False,
    )  # fmt: skip
    with cast("Runtime", model.offload) as runtime:
        return _perplexity(model, windows), runtime.plan


def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def held_out_windows(tokenizer: Any, count: int) -> torch.Tensor:
    """Text that the example model was not trained on: int64 [count, WINDOW_TOKENS + 1]."""
    return _windows(encode([document for document in read_documents() if document.held_out], tokenizer), count)


def _windows(tokens: npt.NDArray[np.int64], count: int) -> torch.Tensor:
    starts = range(0, len(tokens) - WINDOW_TOKENS, WINDOW_TOKENS)[:count]
    return torch.from_numpy(np.stack([tokens[start : start + WINDOW_TOKENS + 1] for start in starts]))


@torch.no_grad()
def _perplexity(model: Callable[..., Any], windows: torch.Tensor) -> float:
    loss = 0.0
    for batch in windows.split(BATCH):
        logits = model(batch[:, :-1], use_cache=False).logits.float()
        loss += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(loss / windows[:, 1:].numel())
