"""Predicted beside measured: decode and prefill over a grid of shapes, formats, budgets and prompts.

The profile is measured once, before; nothing is fitted to the grid. Right before each run a probe streams memory, and
the profile is scaled by what it finds. Prompts and tokens are random, so routing is nearly uniform, which is what the
prediction is told.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import checkpoints
from benchmarks.checkpoints import Shape
from benchmarks.decode import TokenStream
from benchmarks.harness import Report, Row, Spread, say
from benchmarks.peers import Peer
from benchmarks.sessions import ModelOptions
from offload.machine_profile import measure_profile
from offload.preparation import PreparedCheckpoint, prepare_checkpoint
from offload.request import PREFILL_CHUNK_TOKENS, make_request
from placement.hardware_profile import HardwareProfile
from placement.plan import Plan
from placement.planner import make_plan
from placement.prediction import PassPrediction
from placement.workload import Workload
from profiler.stream import stream_bytes_per_s

_CONTEXT_TOKENS = 1024


@dataclass(frozen=True)
class AccuracyScale:
    """How much is run.

    Attributes:
        shapes: models.
        formats: `quant` of each; None for bf16.
        resident: shares of the experts that have a slot.
        prompts: tokens.
        decode_tokens: in each turn.
        turns: of decode and of prefill.
        quick_profile: whether the profile is the quick one.
    """

    shapes: tuple[Shape, ...]
    formats: tuple[str | None, ...]
    resident: tuple[float, ...]
    prompts: tuple[int, ...]
    decode_tokens: int
    turns: int
    quick_profile: bool


WIDE = replace(checkpoints.FULL, layers=12, hidden=2048, experts=32, expert_intermediate=768, heads=32)
NARROW = replace(checkpoints.FULL, layers=16, hidden=768, experts=64, expert_intermediate=768, top_k=4, heads=12)
FULL = AccuracyScale((checkpoints.FULL, WIDE, NARROW), (None, "int8", "int4"), (0.1, 0.4, 1.0), (32, 384), 16, 3, False)
QUICK = AccuracyScale((checkpoints.QUICK,), (None, "int4"), (0.5, 1.0), (32,), 6, 2, True)


def run(work: Path, scale: AccuracyScale) -> Report:
    """The benchmark."""
    report = Report("plan_accuracy")
    say("measuring the machine")
    profile, _ = measure_profile(checkpoints.store_root(work), quick=scale.quick_profile, say=say)
    rows: list[Row] = []
    errors: dict[str, list[float]] = {"decode": [], "prefill": []}
    for shape, quant, resident in _cells(scale):
        checkpoint = checkpoints.ensure_checkpoint(shape, work)
        say(f"{shape.name}, {quant or shape.dtype}, {resident:.0%} of experts")
        for row, found in _run(checkpoint, shape, quant, resident, profile, work, scale):
            rows.append(row)
            for phase, error in found.items():
                errors[phase].append(error)
    report.tables["Predicted and measured"] = rows
    for phase, signed in errors.items():
        # Every second run, as if the others had been fitted to: nothing was, so both halves are alike.
        for name, half in (("all runs", signed), ("every second run", signed[1::2])):
            share = [abs(error) for error in half]
            report.target(f"{phase}, {name}: mean absolute error", statistics.mean(share), "at most", 0.06)
            report.target(f"{phase}, {name}: worst error", max(share), "at most", 0.15)
    report.notes.append(f"Profile: {profile.provenance.machine}, {profile.provenance.date}.")
    report.notes += profile.provenance.notes
    return report


def _cells(scale: AccuracyScale) -> Iterator[tuple[Shape, str | None, float]]:
    for shape in scale.shapes:
        for quant in scale.formats:
            for resident in scale.resident:
                yield shape, quant, resident


def _run(
    checkpoint: Path,
    shape: Shape,
    quant: str | None,
    resident: float,
    profile: HardwareProfile,
    work: Path,
    scale: AccuracyScale,
) -> Iterator[tuple[Row, dict[str, float]]]:
    """One loaded model, every prompt: (row, relative error by phase)."""
    root = checkpoints.store_root(work)
    prepared = _prepare(checkpoint, quant, root)
    everything = prepared.plan
    slots = max(2, round(resident * everything.expert_count))
    ram = everything.peak_ram_nbytes - everything.ram.slot_nbytes + slots * everything.slot_nbytes
    options = ModelOptions("ours", str(checkpoint), ram, str(root), _CONTEXT_TOKENS, quant)
    with Peer(options) as peer:
        peer.ready()
        tokens = TokenStream(shape.vocab)
        for prompt in scale.prompts:
            peer.start(tokens.take(prompt))
            probe = stream_bytes_per_s(repeats=3)
            prefill = [prompt / peer.start(tokens.take(prompt)) for _ in range(scale.turns)]
            peer.feed(tokens.take(scale.decode_tokens))
            fed = [peer.feed(tokens.take(scale.decode_tokens)) for _ in range(scale.turns)]
            workload = Workload(
                _CONTEXT_TOKENS, 1, PREFILL_CHUNK_TOKENS, prompt, (scale.turns + 2) * scale.decode_tokens
            )
            plan = make_plan(prepared.spec, workload, ram, profile.with_memory_speed(probe))
            decode = Spread.of([one.tokens_per_s for one in fed])
            hits = [one.hit_rate for one in fed if one.hit_rate is not None]
            yield _row(shape, quant, resident, prompt, probe, plan, decode, Spread.of(prefill), statistics.median(hits))


def _row(
    shape: Shape,
    quant: str | None,
    resident: float,
    prompt: int,
    probe: float,
    plan: Plan,
    decode: Spread,
    prefill: Spread,
    hits: float,
) -> tuple[Row, dict[str, float]]:
    assert plan.prediction is not None
    told = plan.prediction
    errors = {
        "decode": told.decode.tokens_per_s / decode.median - 1,
        "prefill": told.prefill.tokens_per_s / prefill.median - 1,
    }
    row: Row = {
        "shape": shape.name,
        "format": quant or shape.dtype,
        "resident": f"{resident:.0%}",
        "prompt": prompt,
        "probe GB/s": probe / 1e9,
        "decode tokens/s": decode,
        "predicted": told.decode.tokens_per_s,
        "error": f"{errors['decode']:+.1%}",
        "bound by": told.decode.binds,
        "prefill tokens/s": prefill,
        "predicted prefill": told.prefill.tokens_per_s,
        "prefill error": f"{errors['prefill']:+.1%}",
        "hit rate": hits,
        "predicted hit rate": told.decode.ram_hit_rate,
        "terms of decode": _shares(told.decode),
    }
    return row, errors


def _shares(one: PassPrediction) -> str:
    return " ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in one.terms.as_dict().items() if seconds)


def _prepare(checkpoint: Path, quant: str | None, root: Path) -> PreparedCheckpoint:
    """The model with room for all experts; its files are closed."""
    request = make_request(
        ram=1 << 50, nvme=root, context=_CONTEXT_TOKENS, batch=1, prefill_chunk=PREFILL_CHUNK_TOKENS, max_memory=None,
        quant=quant,
    )  # fmt: skip
    prepared = prepare_checkpoint(checkpoint, request)
    prepared.checkpoint.close()
    return prepared
