"""Predicted beside measured: decode, prefill and peak memory over a grid of shapes, formats, budgets and workloads.

The profile is measured once, before; nothing is fitted to the grid. Right before each run a probe streams memory for a
second, and the profile is scaled by what it finds. Prompts and tokens are random, so routing is nearly uniform, which
is what the prediction is told.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from benchmarks import checkpoints
from benchmarks.checkpoints import Shape
from benchmarks.decode import TokenStream
from benchmarks.harness import Report, Row, Spread, say
from benchmarks.memory import TINY
from benchmarks.peers import Peer
from benchmarks.sessions import Fed, ModelOptions
from offload.machine_profile import measure_profile
from offload.preparation import PreparedCheckpoint, prepare_checkpoint
from offload.request import make_request
from offload.store.convert import convert
from placement.hardware_profile import HardwareProfile
from placement.plan import Plan
from placement.planner import make_plan
from placement.prediction import PassPrediction
from profiler.stream import stream_bytes_per_s

_PROBE_REPEATS = 8
_LEAST_DECODE_S = 1.5
_FEWEST_PASSES, _MOST_PASSES = 4, 24
_NEW_TOKENS = 128
_MOST_TURNS = 8
_UNDISTURBED = 0.05
"""Share of the CPUs' time that others may have in a turn that counts."""


@dataclass(frozen=True)
class Work:
    """What runs: `batch` sequences of `prompt` tokens each."""

    batch: int
    prompt: int


@dataclass(frozen=True)
class AccuracyScale:
    """How much is run.

    Every shape meets every format and every share of resident experts; works go round, so that each meets each of these
    equally often.

    Attributes:
        shapes: models.
        formats: `quant` of each; None for bf16.
        resident: shares of the experts that have a slot.
        works: what runs.
        turns: of decode and of prefill that count: those in which other processes had least of the CPUs. Turns are
            repeated, up to _MOST_TURNS, until so many were undisturbed.
        quick_profile: whether the profile is the quick one.
        limit_s: after so many seconds no other run begins, and the report says how many were left out.
    """

    shapes: tuple[Shape, ...]
    formats: tuple[str | None, ...]
    resident: tuple[float, ...]
    works: tuple[Work, ...]
    turns: int
    quick_profile: bool
    limit_s: float = math.inf


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    shape: Shape
    quant: str | None
    resident: float
    work: Work


MANY = replace(checkpoints.FULL, layers=12)
WIDE = replace(checkpoints.FULL, layers=8, hidden=2048, experts=32, expert_intermediate=768, heads=32)
NARROW = replace(checkpoints.FULL, layers=12, hidden=768, experts=64, expert_intermediate=768, top_k=4, heads=12)
WORKS = (Work(1, 64), Work(1, 384), Work(4, 96))
FULL = AccuracyScale((MANY, WIDE, NARROW), (None, "int8", "int4"), (0.1, 0.4, 1.0), WORKS, 3, False, 640.0)
QUICK = AccuracyScale((checkpoints.QUICK,), (None, "int4"), (0.5, 1.0), (Work(1, 32), Work(2, 16)), 2, True)


def run(work: Path, scale: AccuracyScale) -> Report:
    """The benchmark."""
    report = Report("plan_accuracy")
    began = perf_counter()
    root = checkpoints.store_root(work)
    cells = list(grid(scale))
    prepared = prepare_all(cells, work)
    tiny = checkpoints.ensure_checkpoint(TINY, work)
    say("measuring the machine")
    profile, _ = measure_profile(root, quick=scale.quick_profile, say=say)
    rows: list[Row] = []
    errors: dict[str, list[float]] = {"decode": [], "prefill": [], "peak memory": []}
    for number, cell in enumerate(cells):
        if perf_counter() - began > scale.limit_s:
            report.notes.append(
                f"{len(cells) - number} of {len(cells)} runs were left out after {scale.limit_s:.0f} s."
            )
            break
        row, found = _run(report, cell, prepared[cell], str(tiny), root, profile, scale)
        say(
            ", ".join(
                f"{name} {value}" for name, value in row.items() if "error" in name or "probe" in name or name in _NAMED
            )
        )
        rows.append(row)
        for phase, error in found.items():
            errors[phase].append(error)
    report.gate("the plan that predicts is the one that ran", True, f"slots and peak of {len(rows)} runs")
    report.tables["Predicted and measured"] = rows
    _targets(report, errors)
    report.notes.append(f"Profile: {profile.provenance.machine}, {profile.provenance.date}.")
    report.notes += profile.provenance.notes
    return report


_NAMED = ("shape", "format", "resident", "batch", "prompt", "others")


def _targets(report: Report, errors: dict[str, list[float]]) -> None:
    for phase in ("decode", "prefill"):
        # Every second run, as if the others had been fitted to: nothing was, so both halves are alike.
        for name, half in (("all runs", errors[phase]), ("every second run", errors[phase][1::2])):
            share = [abs(error) for error in half]
            report.target(f"{phase}, {name}: mean absolute error", statistics.mean(share), "at most", 0.06)
            report.target(f"{phase}, {name}: worst error", max(share), "at most", 0.15)
    report.target("peak RSS: predicted above measured, at most", max(errors["peak memory"]), "at most", 0.03)
    report.target("peak RSS: predicted above measured, at least", min(errors["peak memory"]), "at least", 0.0)


def grid(scale: AccuracyScale) -> Iterator[Cell]:
    """The runs, as `AccuracyScale` says, in an order that mixes them: any part of it is a sample of all."""
    cells = [
        Cell(shape, quant, resident, scale.works[(i + j + k) % len(scale.works)])
        for i, shape in enumerate(scale.shapes)
        for j, quant in enumerate(scale.formats)
        for k, resident in enumerate(scale.resident)
    ]
    stride = next(step for step in range(len(cells) // 2 + 1, 2 * len(cells)) if math.gcd(step, len(cells)) == 1)
    for number in range(len(cells)):
        yield cells[number * stride % len(cells)]


def prepare_all(cells: list[Cell], work: Path) -> dict[Cell, PreparedCheckpoint]:
    """Every run's model with room for all experts, its files closed; checkpoints and stores are written if need be."""
    root = checkpoints.store_root(work)
    made = {}
    for cell in cells:
        checkpoint = checkpoints.ensure_checkpoint(cell.shape, work)
        request = make_request(
            ram=1 << 50, nvme=root, context=_context(cell.work), batch=cell.work.batch,
            prefill_chunk=cell.work.prompt, max_memory=None, quant=cell.quant,
        )  # fmt: skip
        made[cell] = prepare_checkpoint(checkpoint, request)
        try:
            convert(made[cell].bundles, root)
        finally:
            made[cell].checkpoint.close()
    return made


def _context(work: Work) -> int:
    return work.prompt + _FEWEST_PASSES + _NEW_TOKENS


def _run(
    report: Report,
    cell: Cell,
    prepared: PreparedCheckpoint,
    tiny: str,
    root: Path,
    profile: HardwareProfile,
    scale: AccuracyScale,
) -> tuple[Row, dict[str, float]]:
    """One loaded model: (row, relative errors)."""
    everything, work = prepared.plan, cell.work
    slots = max(2, round(cell.resident * everything.expert_count))
    ram = everything.peak_ram_nbytes - everything.ram.slot_nbytes + slots * everything.slot_nbytes
    checkpoint = str(prepared.checkpoint.directory)
    options = ModelOptions(
        "ours", checkpoint, ram, str(root), _context(work), cell.quant, work.batch, tiny, work.prompt
    )  # fmt: skip
    with Peer(options) as peer:
        loaded = peer.ready()
        tokens = TokenStream(cell.shape.vocab)
        size = work.batch * work.prompt
        peer.start(tokens.take(size))
        probe = stream_bytes_per_s(repeats=_PROBE_REPEATS)
        prefill = _turns(lambda: peer.prefill(tokens.take(size)), scale.turns)
        warm = peer.feed(tokens.take(work.batch * _FEWEST_PASSES))
        passes = round(min(max(_LEAST_DECODE_S * warm.tokens_per_s / work.batch, _FEWEST_PASSES), _MOST_PASSES))
        peer.start(tokens.take(size))
        fed = _turns(lambda: peer.feed(tokens.take(work.batch * passes)), scale.turns, room=_NEW_TOKENS // passes)
        memory = peer.memory()
    # Decode is predicted half-way through what was decoded.
    workload = replace(everything.workload, prompt_tokens=work.prompt, new_tokens=len(fed) * passes)
    plan = make_plan(prepared.spec, workload, ram, profile.with_memory_speed(probe))
    if (loaded["slots"], loaded["peak_ram_nbytes"]) != (plan.ram_slots, plan.peak_ram_nbytes):
        report.gate("the plan that predicts is the one that ran", False, f"{cell}: {loaded}, {plan.ram_slots} slots")
    return _row(cell, probe, plan, prefill, fed, memory)


def _turns(turn: Callable[[], Fed], wanted: int, room: int = _MOST_TURNS) -> list[Fed]:
    """The least disturbed of as many turns as it takes, at most `room`."""
    found: list[Fed] = []
    while len(found) < min(room, _MOST_TURNS) and sum(one.others <= _UNDISTURBED for one in found) < wanted:
        found.append(turn())
    return sorted(found, key=lambda one: one.others)[:wanted]


def _row(
    cell: Cell, probe: float, plan: Plan, prompts: list[Fed], fed: list[Fed], memory: dict[str, int]
) -> tuple[Row, dict[str, float]]:
    assert plan.prediction is not None
    told = plan.prediction
    decode, prefill = (Spread.of([one.tokens_per_s for one in turns]) for turns in (fed, prompts))
    hits = statistics.median(one.hit_rate for one in fed if one.hit_rate is not None)
    peak = memory["before_nbytes"] + plan.peak_ram_nbytes
    errors = {
        "decode": told.decode.tokens_per_s / decode.median - 1,
        "prefill": told.prefill.tokens_per_s / prefill.median - 1,
        "peak memory": peak / memory["peak_nbytes"] - 1,
    }
    row: Row = {
        "shape": f"{cell.shape.layers}x{cell.shape.hidden}",
        "format": cell.quant or cell.shape.dtype,
        "resident": f"{cell.resident:.0%}",
        "batch": cell.work.batch,
        "prompt": cell.work.prompt,
        "probe GB/s": probe / 1e9,
        "others": f"{max(one.others for one in (*fed, *prompts)):.0%}",
        "decode tokens/s": decode,
        "predicted": told.decode.tokens_per_s,
        "error": f"{errors['decode']:+.1%}",
        "prefill tokens/s": prefill,
        "predicted prefill": told.prefill.tokens_per_s,
        "prefill error": f"{errors['prefill']:+.1%}",
        "hit rate": hits,
        "predicted hit rate": told.decode.ram_hit_rate,
        "peak RSS MB": memory["peak_nbytes"] / 1e6,
        "predicted peak MB": peak / 1e6,
        "peak error": f"{errors['peak memory']:+.1%}",
        "terms of decode, ms": _shares(told.decode),
        "terms of prefill, ms": _shares(told.prefill),
    }
    return row, errors


def _shares(one: PassPrediction) -> str:
    return " ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in one.terms.as_dict().items() if seconds)
