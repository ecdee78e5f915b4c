"""Reports for people, as tables, and for comparison, as JSON with where they come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Report, Spread, Value

RESULTS = Path(__file__).parent / "results"


def show(report: Report, console: Console) -> None:
    """Print the report."""
    console.rule(report.name)
    for gate in report.gates:
        console.print(f"[green]equal[/] {gate.name}: {gate.detail}", highlight=False)
    for title, rows in report.tables.items():
        table = Table(title=title, title_justify="left")
        for column in rows[0] if rows else ():
            table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
        for row in rows:
            table.add_row(*map(text, row.values()))
        console.print(table)
    for target in report.targets:
        verdict = "[green]met[/]" if target.met else "[red]MISSED[/]"
        console.print(f"{verdict} {target.name}: {target.value:.2f}, {target.sense} {target.bound}", highlight=False)
    for note in report.notes:
        console.print(f"- {note}", highlight=False, markup=False)


def text(value: Value) -> str:
    """A cell: spreads as median (minimum-maximum)."""
    if isinstance(value, Spread):
        return f"{_number(value.median)} ({_number(value.minimum)}-{_number(value.maximum)})"
    if isinstance(value, float):
        return _number(value)
    return "" if value is None else str(value)


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def write_json(file: Path, provenance: dict[str, Any], reports: Sequence[Report]) -> None:
    """Write reports with what they belong to; directories are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = {"provenance": provenance, "reports": [report.as_dict() for report in reports]}
    file.write_text(json.dumps(data, indent=1) + "\n")
