from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.harness import GateError, Report, Spread, interleave, ratios
from benchmarks.report import text, write_json


def test_spread_is_the_median_and_the_extremes() -> None:
    assert Spread.of([3.0, 1.0, 10.0, 2.0]) == Spread(2.5, 1.0, 10.0, 4)


def test_interleave_takes_turns_and_swaps_the_order() -> None:
    order: list[str] = []
    results = interleave({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert results == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_ratios_are_taken_round_by_round() -> None:
    # The medians' own ratio would be 1.
    assert ratios([1.0, 2.0, 9.0], [2.0, 9.0, 1.0]) == Spread(0.5, 2 / 9, 9.0, 3)


@pytest.mark.parametrize(
    ("value", "sense", "met"),
    [(0.9, "at least", True), (0.89, "at least", False), (1.0, "at most", True), (1.01, "at most", False)],
)
def test_targets_include_their_bound(value: float, sense: str, met: bool) -> None:
    report = Report("x")
    report.target("t", value, sense, 0.9 if sense == "at least" else 1.0)  # type: ignore[arg-type]
    assert report.targets[0].met is met


def test_a_gate_that_fails_raises_and_is_not_noted() -> None:
    report = Report("x")
    report.gate("fine", True, "same")
    with pytest.raises(GateError, match="x: broken: differ by 3"):
        report.gate("broken", False, "differ by 3")
    assert [gate.name for gate in report.gates] == ["fine"]


def test_reports_become_json_with_targets_judged(tmp_path: Path) -> None:
    report = Report("x")
    report.gate("g", True, "equal")
    report.tables["t"] = [{"speed GB/s": Spread.of([1.0, 2.0]), "name": "n", "share": None}]
    report.target("fast", 2.0, "at least", 1.0)
    write_json(tmp_path / "new" / "out.json", {"cpu": "c"}, [report])
    data = json.loads((tmp_path / "new" / "out.json").read_text())
    assert data["provenance"] == {"cpu": "c"}
    assert data["reports"][0]["tables"]["t"][0]["speed GB/s"] == {
        "median": 1.5, "minimum": 1.0, "maximum": 2.0, "repeats": 2,
    }  # fmt: skip
    assert data["reports"][0]["targets"][0]["met"] is True


def test_cells_show_the_spread() -> None:
    assert text(Spread.of([1.0, 2.0, 30.0])) == "2.00 (1.00-30.0)"
    assert [text(value) for value in (None, "a", 7, 1234.5, 0.25)] == ["", "a", "7", "1234", "0.25"]
