"""Predicted beside measured: decode, prefill and peak memory over a grid of shapes, formats, budgets and workloads.

The profile is measured once, before; nothing is fitted to the grid. Right before each turn that is measured a probe of
a second finds how fast memory, arithmetic and the disk are at the moment, and the profile is scaled by what it
found. Turns are many and short, because the machine changes within seconds; of a run's errors the median counts. The
disk is probed on the run's own store: other files may lie in the memory of a virtual machine's host, or not where the
store does. Prompts and tokens are random, so routing is nearly uniform, which is what the prediction is told. What a
run decodes is known before, so that its plan states the context that it has.

The grid takes longer than one call should: each goes on where the one before stopped, with the same profile, and
reports all runs until then.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from time import perf_counter, time

from benchmarks import checkpoints
from benchmarks.accuracy_run import FEWEST_PASSES, MOST_PASSES, MOST_TURNS, Measured, Turn, measured, passes_of_turn
from benchmarks.checkpoints import Shape
from benchmarks.harness import Report, Row, Spread, say
from benchmarks.memory import TINY
from benchmarks.sessions import ModelOptions
from offload.machine_profile import measure_profile
from offload.measuring.reads import FileReads
from offload.measuring.subjects import RuntimeSubjects
from offload.preparation import PreparedCheckpoint, prepare_checkpoint
from offload.request import make_request
from offload.store import catalog
from offload.store.convert import convert
from placement.curves import SmallProducts
from placement.hardware_profile import HardwareProfile, Speeds
from placement.plan import Plan
from placement.planner import make_plan
from placement.prediction import PassPrediction
from placement.records import from_data
from profiler.probe import probe

_PROBE_S = 1.0
_ROOM = 1 << 50
"""Of RAM: for every expert."""
_OLDEST_S = 12 * 3600.0


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
            repeated, up to MOST_TURNS, until so many were undisturbed.
        quick_profile: whether the profile is the quick one.
        limit_s: after so many seconds no other run begins; the next call goes on from there.
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

    @property
    def name(self) -> str:
        """Of the run, one of its grid."""
        return f"{self.shape.name} {self.quant} {self.resident} {self.work.batch}x{self.work.prompt}"


MANY = replace(checkpoints.FULL, layers=12)
WIDE = replace(checkpoints.FULL, layers=8, hidden=2048, experts=32, expert_intermediate=768, heads=32)
NARROW = replace(checkpoints.FULL, layers=12, hidden=768, experts=64, expert_intermediate=768, top_k=4, heads=12)
WORKS = (Work(1, 64), Work(1, 384), Work(4, 96))
FULL = AccuracyScale((MANY, WIDE, NARROW), (None, "int8", "int4"), (0.1, 0.4, 1.0), WORKS, 8, False, 660.0)
QUICK = AccuracyScale((checkpoints.QUICK,), (None, "int4"), (0.5, 1.0), (Work(1, 32), Work(2, 16)), 2, True)


class Grid:
    """What was measured of a grid, kept in a file between calls."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.profile: HardwareProfile | None = None
        self.rows: dict[str, Measured] = {}

    def read(self, cells: Sequence[Cell]) -> None:
        """Go on with a grid of the same runs that was begun in the last hours and is not complete."""
        if not self._file.exists() or time() - self._file.stat().st_mtime > _OLDEST_S:
            return
        data = json.loads(self._file.read_text())
        rows = {name: from_data(Measured, row, "run") for name, row in data["rows"].items()}
        names = {cell.name for cell in cells}
        if set(rows) < names:
            self.profile, self.rows = HardwareProfile.from_json(data["profile"]), rows

    def write(self) -> None:
        """Keep it."""
        assert self.profile is not None
        rows = {name: asdict(row) for name, row in self.rows.items()}
        self._file.write_text(json.dumps({"profile": self.profile.to_json(), "rows": rows}))


def run(work: Path, scale: AccuracyScale) -> Report:
    """The benchmark."""
    began = perf_counter()
    root = checkpoints.store_root(work)
    cells = list(grid(scale))
    prepared = prepare_all(cells, work)
    tiny = str(checkpoints.ensure_checkpoint(TINY, work))
    kept = Grid(work / "plan_accuracy_runs.json")
    kept.read(cells)
    if kept.profile is None:
        say("measuring the machine")
        kept.profile, _ = measure_profile(root, quick=scale.quick_profile, say=say)
    profile = kept.profile
    left = [cell for cell in cells if cell.name not in kept.rows]
    for number, cell in enumerate(left):
        if number and perf_counter() - began > scale.limit_s:
            break
        plan = plan_of(cell, prepared[cell], profile)
        disk = _store_of(prepared[cell], root)
        if cell.resident < 1:
            # Predictions are of a model that has read its experts before.
            disk.read_first(disk.nbytes)
        with RuntimeSubjects(disk, root, repeats=0) as subjects:

            def speeds(cell: Cell = cell, plan: Plan = plan, subjects: RuntimeSubjects = subjects) -> Speeds:
                block = min(plan.slot_nbytes, plan.read_chunk_nbytes) if cell.resident < 1 else 0
                return probe(subjects, profile, cell.quant or "bf16", block, plan.reader_threads, _PROBE_S)

            kept.rows[cell.name] = found = measured(
                _options(cell, prepared[cell], profile, root, tiny), cell.work.prompt, cell.shape.vocab, scale.turns,
                passes_of(cell, prepared[cell], profile), speeds,
            )  # fmt: skip
        kept.write()
        row, _ = row_of(cell, prepared[cell], profile, found)
        say(", ".join(f"{name} {row[name]}" for name in _NAMED))
    return report_of(cells, prepared, profile, kept.rows)


def _store_of(prepared: PreparedCheckpoint, root: Path) -> FileReads:
    """The files that a run reads its experts from."""
    store = catalog.find(root, prepared.bundles.identity, prepared.plan.format)
    assert store is not None, "stores are written before"
    return FileReads(store.shard_paths)


_NAMED = ("shape", "format", "resident", "batch", "prompt", "others", "error", "prefill error", "peak error")


def report_of(
    cells: Sequence[Cell],
    prepared: dict[Cell, PreparedCheckpoint],
    profile: HardwareProfile,
    found: dict[str, Measured],
) -> Report:
    """Predictions beside what was measured."""
    report = Report("plan_accuracy")
    done = [cell for cell in cells if cell.name in found]
    for cell in done:
        plan, loaded = plan_of(cell, prepared[cell], profile), found[cell.name]
        if (loaded.slots, loaded.plan_nbytes) != (plan.ram_slots, plan.peak_ram_nbytes):
            report.gate(
                "the plan that predicts is the one that ran", False, f"{cell}: {loaded}, {plan.ram_slots} slots"
            )
    report.gate("the plan that predicts is the one that ran", True, f"slots and peak of {len(done)} runs")
    pairs = [row_of(cell, prepared[cell], profile, found[cell.name]) for cell in done]
    report.tables["Predicted and measured"] = [row for row, _ in pairs]
    _targets(report, [errors for _, errors in pairs])
    _tell_disturbed(report, [found[cell.name].is_disturbed for cell in done], pairs)
    if len(done) < len(cells):
        report.notes.append(f"{len(cells) - len(done)} of {len(cells)} runs are still to be measured.")
    report.notes.append(f"Profile: {profile.provenance.machine}, {profile.provenance.date}.")
    report.notes.append(
        f"Each turn is predicted from a probe of {_PROBE_S:g} seconds before it; errors are medians of a run's turns. "
        "The speeds before prompts and before decode are the medians of what the probes found, over the profile's: of "
        "experts of one token (memory), of 8 (between) and of more (arithmetic), of linear layers likewise; of both "
        "with few weights, beside that, of one token and of many; of prompts' attention; of passes of a small model "
        "of one token (steps) and of more (prompts); of reads and of bursts of them. Predicted speeds are those at "
        "these medians."
    )
    report.notes += profile.provenance.notes
    return report


def _targets(report: Report, errors: Sequence[dict[str, float]]) -> None:
    for phase in ("decode", "prefill"):
        # Every second run, as if the others had been fitted to.
        for name, half in (("all runs", errors), ("every second run", errors[1::2] or errors)):
            share = [abs(one[phase]) for one in half]
            report.target(f"{phase}, {name}: mean absolute error", statistics.mean(share), "at most", 0.06)
            report.target(f"{phase}, {name}: worst error", max(share), "at most", 0.15)
    peaks = [abs(one["peak memory"]) for one in errors]
    report.target("peak RSS: worst error of what is expected", max(peaks), "at most", 0.03)
    bounds = [one["peak bound"] for one in errors]
    report.target("peak RSS: the plan's bound above measured", min(bounds), "at least", 0.0)


def _tell_disturbed(report: Report, disturbed: Sequence[bool], pairs: Sequence[tuple[Row, dict[str, float]]]) -> None:
    """A note of runs beside which other processes ran. They are in all figures."""
    quiet = [errors for (_, errors), one in zip(pairs, disturbed, strict=True) if not one]
    if not quiet or len(quiet) == len(pairs):
        return
    shares = {phase: [abs(one[phase]) for one in quiet] for phase in ("decode", "prefill")}
    errors = ", ".join(
        f"{phase} {statistics.mean(share):.1%} off, {max(share):.0%} at worst" for phase, share in shares.items()
    )
    report.notes.append(
        f"In {len(pairs) - len(quiet)} of {len(pairs)} runs other processes had more than a twentieth of the CPUs in a "
        f"turn that counts; the others: {errors}."
    )


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
            ram=_ROOM, nvme=root, context=_context(cell.work, MOST_PASSES), batch=cell.work.batch,
            prefill_chunk=cell.work.prompt, max_memory=None, quant=cell.quant,
        )  # fmt: skip
        made[cell] = prepare_checkpoint(checkpoint, request)
        try:
            convert(made[cell].bundles, root)
        finally:
            made[cell].checkpoint.close()
    return made


def _context(work: Work, passes: int) -> int:
    """Tokens of a sequence, at most: what is decoded is known before, and plans have room for that and no more."""
    return work.prompt + FEWEST_PASSES + MOST_TURNS * passes


def passes_of(cell: Cell, prepared: PreparedCheckpoint, profile: HardwareProfile) -> int:
    """Passes of a turn of decode."""
    plan = _planned(cell, prepared, MOST_PASSES, profile, 1)
    assert plan.prediction is not None
    return passes_of_turn(plan.prediction.decode.tokens_per_s / cell.work.batch)


def plan_of(
    cell: Cell, prepared: PreparedCheckpoint, profile: HardwareProfile, speeds: Speeds | None = None, new: int = 1
) -> Plan:
    """The plan of a run, with a prediction for so many new tokens at some speeds."""
    passes = passes_of(cell, prepared, profile)
    return _planned(cell, prepared, passes, profile.with_speeds(speeds or Speeds()), new)


def _planned(cell: Cell, prepared: PreparedCheckpoint, passes: int, profile: HardwareProfile, new: int) -> Plan:
    workload = replace(
        prepared.plan.workload, context_tokens=_context(cell.work, passes), prompt_tokens=cell.work.prompt,
        new_tokens=new,
    )  # fmt: skip
    everything = make_plan(prepared.spec, workload, _ROOM)
    slots = max(2, round(cell.resident * everything.expert_count))
    ram = everything.peak_ram_nbytes - everything.ram.slot_nbytes + slots * everything.slot_nbytes
    # Where loading takes more than so few slots, it has that.
    return make_plan(prepared.spec, workload, max(ram, everything.minimum_ram_nbytes), profile)


def _options(cell: Cell, prepared: PreparedCheckpoint, profile: HardwareProfile, root: Path, tiny: str) -> ModelOptions:
    work, plan = cell.work, plan_of(cell, prepared, profile)
    return ModelOptions(
        "ours", str(prepared.checkpoint.directory), plan.peak_ram_nbytes, str(root), plan.workload.context_tokens,
        cell.quant, work.batch, tiny, work.prompt,
    )  # fmt: skip


def _median(turns: Sequence[Turn]) -> Speeds:
    return Speeds.median_of([one.speeds for one in turns])


def row_of(
    cell: Cell, prepared: PreparedCheckpoint, profile: HardwareProfile, found: Measured
) -> tuple[Row, dict[str, float]]:
    """(a line of the table, relative errors)."""
    turns = {"prefill": found.prefill, "decode": found.decode}
    speeds = {phase: _median(of) for phase, of in turns.items()}
    # Decode is predicted half-way through what was decoded.
    new = found.decode_passes * found.decoded_turns

    def told_at(phase: str, one: Speeds) -> PassPrediction:
        prediction = plan_of(cell, prepared, profile, one, new).prediction
        assert prediction is not None
        part: PassPrediction = getattr(prediction, phase)
        return part

    told = {phase: told_at(phase, one) for phase, one in speeds.items()}
    speed = {phase: Spread.of([one.tokens_per_s for one in turns[phase]]) for phase in turns}
    hits = statistics.median(one.hit_rate for one in found.decode)
    peak = found.before_nbytes + plan_of(cell, prepared, profile, new=FEWEST_PASSES + new).workload_peak_ram_nbytes
    # Each turn beside what its own probe predicts: the machine changes from one to the next.
    errors = {
        phase: statistics.median(told_at(phase, one.speeds).tokens_per_s / one.tokens_per_s for one in of) - 1
        for phase, of in turns.items()
    }
    errors["peak memory"] = peak / found.peak_nbytes - 1
    errors["peak bound"] = (found.before_nbytes + found.plan_nbytes) / found.peak_nbytes - 1
    row: Row = {
        "shape": f"{cell.shape.layers}x{cell.shape.hidden}",
        "format": cell.quant or cell.shape.dtype,
        "resident": f"{cell.resident:.0%}",
        "batch": cell.work.batch,
        "prompt": cell.work.prompt,
        "measured at": found.date,
        "commit": found.commit,
        "speeds of prompts": _told(speeds["prefill"]),
        "speeds of decode": _told(speeds["decode"]),
        "others": f"{max(one.others for one in (*found.decode, *found.prefill)):.0%}",
        "decode tokens/s": speed["decode"],
        "predicted": told["decode"].tokens_per_s,
        "error": f"{errors['decode']:+.1%}",
        "prefill tokens/s": speed["prefill"],
        "predicted prefill": told["prefill"].tokens_per_s,
        "prefill error": f"{errors['prefill']:+.1%}",
        "hit rate": hits,
        "predicted hit rate": told["decode"].ram_hit_rate,
        "peak RSS MB": found.peak_nbytes / 1e6,
        "predicted peak MB": peak / 1e6,
        "peak error": f"{errors['peak memory']:+.1%}",
        "planned peak MB": (found.before_nbytes + found.plan_nbytes) / 1e6,
        "terms of decode, ms": _shares(told["decode"]),
        "terms of prefill, ms": _shares(told["prefill"]),
    }
    return row, errors


def _told(speeds: Speeds) -> str:
    found = {one.name: getattr(speeds, one.name) for one in fields(speeds)}
    return ", ".join(
        f"{name} {f'{speed.few:.2f} {speed.many:.2f}' if isinstance(speed, SmallProducts) else f'{speed:.2f}'}"
        for name, speed in found.items()
        if speed is not None
    )


def _shares(one: PassPrediction) -> str:
    return " ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in one.terms.as_dict().items() if seconds)
