"""Predicted beside measured, term by term, for what a runtime has done."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload.sizes import format_size

if TYPE_CHECKING:
    from offload.statistics import Statistics
    from placement.plan import Plan
    from placement.prediction import PassPrediction


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

    def __str__(self) -> str:
        rows = [f"{'':34}{'predicted':>12}{'measured':>12}{'error':>9}"]
        for line in self.lines:
            error = "" if line.error is None else f"{line.error:+.1%}"
            rows.append(f"{line.name:34}{_cell(line.predicted):>12}{_cell(line.measured):>12}{error:>9}")
        return "\n".join([self.model, *rows, *self.notes])

    def _repr_html_(self) -> str:
        """For notebooks."""
        head = "<tr><th></th><th>predicted</th><th>measured</th><th>error</th></tr>"
        rows = []
        for line in self.lines:
            error = "" if line.error is None else f"{line.error:+.1%}"
            cells = (line.name, _cell(line.predicted), _cell(line.measured), error)
            rows.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<p><b>{html.escape(self.model)}</b></p><table>{head}{''.join(rows)}</table>{notes}"


def reconcile(plan: Plan, stats: Statistics) -> Reconciliation:
    """What a plan predicted beside what statistics counted.

    Terms of passes are told apart where only one kind of pass was run since the counters were reset: the time in MoE
    layers is then that pass's. Experts include routing and combining, which the prediction has among its overheads.

    Args:
        plan: with or without a prediction.
        stats: of a runtime that executed it.
    """
    told = plan.prediction
    decode = told.decode if told else None
    prefill = told.prefill if told else None
    lines = [
        Line("decode, tokens/s", decode.tokens_per_s if decode else None, stats.decode_tokens_per_s or None),
        Line("prefill, tokens/s", prefill.tokens_per_s if prefill else None, stats.prefill_tokens_per_s or None),
        Line("peak RAM, MiB", plan.peak_ram_nbytes / (1 << 20), None),
    ]
    if stats.decode_tokens and not stats.prefill_tokens:
        lines += _terms("decode", decode, stats, stats.decode_s, stats.decode_tokens)
    elif stats.prefill_tokens and not stats.decode_tokens:
        lines += _terms("prefill", prefill, stats, stats.prefill_s, stats.prefill_tokens)
    return Reconciliation(plan.model, tuple(lines), tuple(_notes(plan, stats)))


def _terms(phase: str, told: PassPrediction | None, stats: Statistics, seconds: float, tokens: int) -> list[Line]:
    """Milliseconds of a token: outside MoE layers, computing experts, waiting for reads; and the hit rate."""

    def predicted(*names: str) -> float | None:
        if told is None:
            return None
        return 1e3 * sum(told.terms.as_dict()[name] for name in names) / told.tokens

    def line(name: str, measured_s: float, *names: str) -> Line:
        return Line(f"{phase}, {name}, ms a token", predicted(*names), 1e3 * measured_s / tokens)

    hits = None if told is None else told.ram_hit_rate + told.vram_hit_rate
    return [
        line("dense, attention, overhead", seconds - stats.moe_s, "dense", "attention", "overhead"),
        line("experts", stats.moe_s - stats.read_stall_s, "cpu_experts", "gpu_experts", "link"),
        line("reads waited for", stats.read_stall_s, "disk"),
        Line(f"{phase}, hit rate", hits, stats.hit_rate),
    ]


def _notes(plan: Plan, stats: Statistics) -> list[str]:
    notes = []
    if plan.prediction is None:
        notes.append("nothing was predicted: run `offload profile` once, then load again")
    else:
        work = plan.workload
        notes.append(
            f"predicted for a prompt of {min(work.prompt_tokens, work.context_tokens)} tokens and batch {work.batch}, "
            f"on {plan.prediction.profile} ({plan.prediction.basis}); {plan.prediction.routing}"
        )
    if stats.decode_tokens and stats.prefill_tokens:
        notes.append("terms are told apart after `reset_stats()` and passes of one kind alone")
    notes.append(f"read from disk: {format_size(stats.bytes_read)}")
    return notes


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"
