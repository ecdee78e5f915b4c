"""Predicted beside measured, term by term, for what a runtime has done."""

from __future__ import annotations

import html
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from offload.sizes import format_size
from profiler.memory import process_peak_rss_nbytes, process_rss_nbytes

if TYPE_CHECKING:
    from offload.statistics import Statistics
    from placement.plan import Plan

_DENSE = ("dense", "attention", "overhead")
_EXPERTS = ("cpu_experts", "gpu_experts", "link")


@dataclass(frozen=True)
class Line:
    """One figure.

    Attributes:
        name: what it is, with its unit.
        predicted: by the plan; None where it predicts nothing.
        measured: None where nothing was run.
    """

    name: str
    predicted: float | None
    measured: float | None

    @property
    def error(self) -> float | None:
        """Predicted / measured - 1; None where one is missing or nothing was measured."""
        if self.predicted is None or not self.measured:
            return None
        return self.predicted / self.measured - 1

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Name, predicted, measured and error in words."""
        error = "" if self.error is None else f"{self.error:+.1%}"
        return self.name, _cell(self.predicted), _cell(self.measured), error


@dataclass(frozen=True)
class Reconciliation:
    """A plan's predictions and what came of them.

    Attributes:
        model: what the user called it.
        lines: figures, speeds first.
        notes: what a reader must know.
    """

    model: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; figures by name."""
        figures = {
            line.name: {"predicted": line.predicted, "measured": line.measured, "error": line.error}
            for line in self.lines
        }
        return {"model": self.model, "figures": figures, "notes": list(self.notes)}

    def __str__(self) -> str:
        rows = [f"{'':44}{'predicted':>12}{'measured':>12}{'error':>9}"]
        for name, predicted, measured, error in (line.cells for line in self.lines):
            rows.append(f"{name:44}{predicted:>12}{measured:>12}{error:>9}")
        return "\n".join([self.model, *rows, *self.notes])

    def _repr_html_(self) -> str:
        """For notebooks."""
        head = "<tr><th></th><th>predicted</th><th>measured</th><th>error</th></tr>"
        rows = []
        for line in self.lines:
            rows.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line.cells)}</tr>")
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<p><b>{html.escape(self.model)}</b></p><table>{head}{''.join(rows)}</table>{notes}"


@dataclass(frozen=True)
class MemoryUse:
    """Resident memory of the process that a model was loaded into.

    Attributes:
        before_nbytes: when loading began: interpreter, libraries, and whatever else the process held.
        peak_before_nbytes: the most until then.
        peak_nbytes: the most until now.
    """

    before_nbytes: int
    peak_before_nbytes: int
    peak_nbytes: int

    @classmethod
    def now(cls) -> MemoryUse:
        """What the process holds as loading begins."""
        peak = process_peak_rss_nbytes()
        return cls(process_rss_nbytes(), peak, peak)

    def until_now(self) -> MemoryUse:
        """With the peak until now."""
        return replace(self, peak_nbytes=process_peak_rss_nbytes())

    @property
    def measured_nbytes(self) -> int | None:
        """The peak since loading began; None where it lies before that."""
        return self.peak_nbytes if self.peak_nbytes > self.peak_before_nbytes else None


def reconcile(plan: Plan, stats: Statistics, memory: MemoryUse | None = None) -> Reconciliation:
    """What a plan predicted beside what statistics counted.

    Terms of passes are told apart where only one kind of pass was run since the counters were reset: the time in MoE
    layers is then that pass's. Experts include routing and combining, which the prediction has among its overheads.

    Args:
        plan: with or without a prediction.
        stats: of a runtime that executed it.
        memory: of its process; None where nobody looked.
    """
    lines = [*_speeds(plan, stats, stats), _peak(plan, memory)]
    if stats.decode_tokens and not stats.prefill_tokens:
        lines += _terms("decode", plan, stats)
    elif stats.prefill_tokens and not stats.decode_tokens:
        lines += _terms("prefill", plan, stats)
    notes = _notes(plan)
    if stats.decode_tokens and stats.prefill_tokens:
        notes.append("terms are told apart after `reset_stats()` and passes of one kind alone")
    if plan.expert_count:
        notes.append(f"read from disk: {format_size(stats.bytes_read)}")
    return Reconciliation(plan.model, tuple(lines), tuple(notes))


def reconcile_phases(plan: Plan, prefill: Statistics, decode: Statistics, memory: MemoryUse | None) -> Reconciliation:
    """As `reconcile`, of passes of a prompt and of decode that were counted apart: with the terms of both."""
    lines = [*_speeds(plan, prefill, decode), _peak(plan, memory)]
    lines += [*_terms("decode", plan, decode), *_terms("prefill", plan, prefill)]
    return Reconciliation(plan.model, tuple(lines), tuple(_notes(plan)))


def _speeds(plan: Plan, prefill: Statistics, decode: Statistics) -> list[Line]:
    told = plan.prediction
    return [
        Line("decode, tokens/s", told.decode.tokens_per_s if told else None, decode.decode_tokens_per_s or None),
        Line("prefill, tokens/s", told.prefill.tokens_per_s if told else None, prefill.prefill_tokens_per_s or None),
    ]


def _peak(plan: Plan, memory: MemoryUse | None) -> Line:
    """Of the process: the peak of the plan's workload and what was there before."""
    if memory is None:
        return Line("peak RAM of the plan, MiB", plan.workload_peak_ram_nbytes / (1 << 20), None)
    measured = memory.measured_nbytes
    predicted = (memory.before_nbytes + plan.workload_peak_ram_nbytes) / (1 << 20)
    return Line("peak RSS, MiB", predicted, None if measured is None else measured / (1 << 20))


def _terms(phase: Literal["decode", "prefill"], plan: Plan, stats: Statistics) -> list[Line]:
    """Milliseconds of a token: outside MoE layers, computing experts, waiting for reads; hit rate and bytes read.

    Where a tape computed whole passes nobody saw experts apart, and one line stands for both; so it does for all of a
    dense model's.
    """
    told = None if plan.prediction is None else getattr(plan.prediction, phase)
    seconds, tokens = getattr(stats, f"{phase}_s"), getattr(stats, f"{phase}_tokens")
    if not tokens:
        return []

    def line(name: str, measured_s: float, *names: str) -> Line:
        predicted = None if told is None else 1e3 * sum(told.terms.as_dict()[name] for name in names) / told.tokens
        return Line(f"{phase}, {name}, ms a token", predicted, 1e3 * measured_s / tokens)

    if not plan.expert_count:
        return [line("dense, attention, overhead, link", seconds, *_DENSE, "link")]
    if stats.moe_steps and not stats.moe_s:
        terms = [line("all but reads", seconds - stats.read_stall_s, *_DENSE, *_EXPERTS)]
    else:
        terms = [
            line("dense, attention, overhead", seconds - stats.moe_s, *_DENSE),
            line("experts", stats.moe_s - stats.read_stall_s, *_EXPERTS),
        ]
    hits = None if told is None else told.ram_hit_rate + told.vram_hit_rate
    read = None if told is None else told.read_nbytes / told.tokens / (1 << 20)
    return [
        *terms,
        line("reads waited for", stats.read_stall_s, "disk"),
        Line(f"{phase}, hit rate", hits, stats.hit_rate),
        Line(f"{phase}, MiB read a token", read, stats.bytes_read / tokens / (1 << 20)),
    ]


def _notes(plan: Plan) -> list[str]:
    if plan.prediction is None and plan.vram is not None:
        return ["nothing was predicted of the accelerator: no profile knows it"]
    if plan.prediction is None:
        return ["nothing was predicted: run `offload profile` once, then load again"]
    work = plan.workload
    return [
        f"predicted for a prompt of {min(work.prompt_tokens, work.context_tokens)} tokens and batch {work.batch}, "
        f"on {plan.prediction.profile} ({plan.prediction.basis}); {plan.prediction.routing}"
    ]


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"
