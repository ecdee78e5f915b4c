"""A model over three tiers at shares of its experts in VRAM: speed by share, and whether the tokens stay the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

import offload
from benchmarks import gpu_peers
from benchmarks.checkpoints import Shape, ensure_checkpoint, random_tokens, store_root, vocabulary, vram_for
from benchmarks.harness import Report, Row, say
from offload.bench import Amount, predict_run
from offload.sizes import parse_size
from placement.hardware_profile import HardwareProfile

if TYPE_CHECKING:
    from offload.runtime import Runtime

MODELS = {
    "Mixtral-like": Shape(2, 4096, 8, 14336, 2, 32, 8, 128, 32000, router_skew=0.3),
    "Qwen3-30B-A3B-like": Shape(4, 2048, 128, 768, 8, 32, 4, 128, 32000, router_skew=0.8),
    "DeepSeek-V2-Lite-like": Shape(4, 2048, 64, 1408, 6, 16, 16, 128, 32000, router_skew=0.8),
}
"""The experts' sizes are those of the models; layers and vocabulary are cut where disk and time ask for it. Some
experts are more popular than others.
"""

SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class ModelScale:
    """How much is measured.

    Attributes:
        shapes: models by name, with random weights.
        shares: of the experts that have slots in VRAM, the largest first.
        prompt_tokens: of one prompt.
        new_tokens: decoded greedily.
        ram: budget in host memory.
    """

    shapes: dict[str, Shape]
    shares: tuple[float, ...]
    prompt_tokens: int
    new_tokens: int
    ram: str


FULL = ModelScale(MODELS, SHARES, 512, 64, "96GiB")
TINY = Shape(2, 64, 4, 48, 2, 4, 2, 16, 199)
QUICK = ModelScale({"tiny": TINY}, (1.0, 0.5), 24, 4, "1GiB")


@dataclass(frozen=True)
class _Variant:
    """How ours runs.

    Attributes:
        name: in the table.
        options: of `offload.load`.
        change: what is done to the runtime before.
        is_ours: no baseline.
    """

    name: str
    options: dict[str, Any]
    change: Callable[[Runtime], None] = lambda _: None
    is_ours: bool = False


_VARIANTS = (
    _Variant("scheduled", {}, is_ours=True),
    _Variant("scheduled, graphs", {"step_graph": True}, is_ours=True),
    _Variant("misses on the CPU", {"policy": "lru"}, gpu_peers.leave_to_cpu),
    _Variant("misses copied, LRU", {"policy": "lru"}, gpu_peers.copy_all),
)
ACCELERATE = "accelerate"

_FIGURES = (
    "decode_tokens_per_s", "prefill_tokens_per_s", "predicted_decode", "predicted_prefill", "vram_hit_rate",
    "GB_copied", "steps_replayed",
)  # fmt: skip


def model_table(
    report: Report, scale: ModelScale, device: str, work: Path, profile: HardwareProfile | None
) -> list[Row]:
    """Rows of every model, share and way to run it.

    Args:
        report: takes gates, and on a GPU targets: there roundings depend on where an expert was computed.
        scale: how much.
        device: "cuda:N", or "host" for an accelerator that host memory plays, whose speed means nothing.
        work: directory for checkpoints and stores.
        profile: of the machine; None to predict nothing.
    """
    rows: list[Row] = []
    for name, shape in scale.shapes.items():
        checkpoint = ensure_checkpoint(shape, work)
        first: list[int] = []
        for share in scale.shares:
            say(f"{name}, {share:.0%} of the experts in VRAM")
            options = _options(scale, device, work)
            vram = vram_for(
                checkpoint, share, device=device, ram=scale.ram, context=options["context"], root=options["nvme"]
            )
            for variant in _VARIANTS:
                gpu_peers.release()
                tokens, row = _measure(checkpoint, scale, vram, device, work, variant, profile)
                first = first or tokens
                same = _alike(tokens, first)
                label = f"{name}, {share:.0%}, {variant.name}"
                if device == "host" and "step_graph" not in variant.options:
                    report.gate(label, same == 1.0, "tokens as with all experts in VRAM")
                elif variant.is_ours:
                    report.target(f"{label}: tokens as with all in VRAM", same, "at least", 1.0)
                rows.append(_row(name, share, variant.name, row, same))
            gpu_peers.release()
            ram = parse_size(scale.ram, "ram")
            tokens, row = gpu_peers.accelerate_row(
                checkpoint, vram, ram, device, _prompt(checkpoint, scale), scale.new_tokens
            )
            rows.append(_row(name, share, ACCELERATE, row, _alike(tokens, first)))
            _compare(report, rows[-len(_VARIANTS) - 1 :], device)
    return rows


def _row(name: str, share: float, way: str, found: Row, same: float) -> Row:
    """A line of the table; what a way does not have is empty."""
    figures = {column: found.get(column) for column in _FIGURES}
    return {"model": name, "experts_in_vram": share, "way": way, **figures, "same_tokens": same}


def _alike(tokens: list[int], others: list[int]) -> float:
    return sum(a == b for a, b in zip(tokens, others, strict=True)) / len(others)


def _compare(report: Report, rows: list[Row], device: str) -> None:
    """The best of ours against each baseline, and predicted against measured; on a GPU only."""
    if device == "host":
        return
    ours = {variant.name for variant in _VARIANTS if variant.is_ours}
    label = f"{rows[0]['model']}, {rows[0]['experts_in_vram']:.0%}"
    for phase in ("decode", "prefill"):
        name = f"{phase}_tokens_per_s"
        best = max(cast("float", row[name]) for row in rows if row["way"] in ours)
        for row in rows:
            if row["way"] not in ours:
                speed = cast("float", row[name])
                report.target(f"{label}: {phase}, of {row['way']}", best / speed, "at least", 1.0)
        measured, told = rows[0][name], rows[0].get(f"predicted_{phase}")
        if told is not None:
            error = abs(cast("float", told) / cast("float", measured) - 1)
            report.target(f"{label}: {phase}, predicted against measured", error, "at most", 0.06)


def _options(scale: ModelScale, device: str, work: Path) -> dict[str, Any]:
    context = scale.prompt_tokens + scale.new_tokens
    return {"ram": scale.ram, "nvme": store_root(work), "context": context, "device": device}


def _prompt(checkpoint: Path, scale: ModelScale) -> torch.Tensor:
    return torch.tensor([random_tokens(scale.prompt_tokens, vocabulary(checkpoint), seed=1)])


def _measure(
    checkpoint: Path,
    scale: ModelScale,
    vram: int,
    device: str,
    work: Path,
    variant: _Variant,
    profile: HardwareProfile | None,
) -> tuple[list[int], Row]:
    model = offload.load(
        checkpoint, **_options(scale, device, work), vram=vram, progress=False, **variant.options
    )  # fmt: skip
    runtime = cast("Runtime", model.offload)
    with runtime:
        variant.change(runtime)
        ids = _prompt(checkpoint, scale).to(model.device)
        amount = Amount(1, scale.prompt_tokens, scale.new_tokens, 1)
        told = predict_run(runtime, amount, profile, None).prediction if variant.is_ours else None
        # Kernels are compiled and the caches warm before what counts.
        _greedy(model, ids, 2)
        runtime.reset_stats()
        out = _greedy(model, ids, scale.new_tokens)
        stats = runtime.stats()
    upper = stats.accelerator
    assert upper is not None
    predictions: Row = {}
    if told is not None:
        predictions = {
            "predicted_decode": told.decode.tokens_per_s,
            "predicted_prefill": told.prefill.tokens_per_s,
        }
    return out[0, ids.shape[1] :].tolist(), {
        **predictions,
        "decode_tokens_per_s": stats.decode_tokens_per_s,
        "prefill_tokens_per_s": stats.prefill_tokens_per_s,
        "vram_hit_rate": upper.hits / max(1, upper.hits + upper.misses),
        "GB_copied": upper.bytes_copied / 1e9,
        "steps_replayed": 0 if stats.graphs is None else stats.graphs.replayed,
    }


def _greedy(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    out = model.generate(  # type: ignore[operator]
        ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
    )
    assert isinstance(out, torch.Tensor)
    return out
