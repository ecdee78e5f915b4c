"""Predicted beside measured: figures that must come out, from made-up runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from offload.reconciliation import Reconciliation, reconcile
from offload.statistics import Statistics
from placement.planner import make_plan
from placement.workload import Workload
from tests.placement.machines import machine, model

SPEC = model()
WORK = Workload(512, prompt_tokens=64, new_tokens=16)
PLAN = make_plan(SPEC, WORK, 1 << 34, machine(gpu=False))


def stats(**changed: Any) -> Statistics:
    counted = dict.fromkeys((field for field in Statistics.__dataclass_fields__ if field != "fused"), 0)
    return Statistics(**{**counted, "direct_io": True, "fused": {}, **changed})


def line(found: Reconciliation, name: str) -> Any:
    return next(line for line in found.lines if line.name == name)


def test_speeds_and_terms_of_decode() -> None:
    assert PLAN.prediction is not None
    told = PLAN.prediction.decode
    found = reconcile(PLAN, stats(decode_tokens=10, decode_s=2.0, moe_s=1.2, read_stall_s=0.5, hits=3, misses=1))
    speed = line(found, "decode, tokens/s")
    assert (speed.predicted, speed.measured) == (told.tokens_per_s, 5.0)
    assert speed.error == pytest.approx(told.tokens_per_s / 5 - 1)
    names = ["dense, attention, overhead", "experts", "reads waited for"]
    terms = [line(found, f"decode, {name}, ms a token") for name in names]
    assert [term.measured for term in terms] == pytest.approx([80, 70, 50])
    assert sum(term.measured for term in terms) == pytest.approx(1e3 * 2.0 / 10), "nothing is lost"
    assert sum(term.predicted for term in terms) == pytest.approx(1e3 * told.seconds / told.tokens)
    assert line(found, "decode, hit rate").measured == 0.75
    assert line(found, "prefill, tokens/s").measured is None
    assert line(found, "prefill, tokens/s").error is None


def test_prefill_is_by_token_too() -> None:
    found = reconcile(PLAN, stats(prefill_tokens=64, prefill_s=0.64, moe_s=0.32))
    assert line(found, "prefill, experts, ms a token").measured == pytest.approx(5)
    assert PLAN.prediction is not None
    told = PLAN.prediction.prefill
    parts = [entry.predicted for entry in found.lines if entry.name.endswith("ms a token")]
    assert sum(part for part in parts if part) == pytest.approx(1e3 * told.seconds / 64)


def test_passes_of_both_kinds_are_not_told_apart() -> None:
    found = reconcile(PLAN, stats(prefill_tokens=64, prefill_s=1.0, decode_tokens=4, decode_s=1.0, moe_s=1.0))
    assert not [entry for entry in found.lines if "ms a token" in entry.name]
    assert any("reset_stats" in note for note in found.notes)


def test_without_a_prediction_it_says_how_to_get_one() -> None:
    found = reconcile(replace(PLAN, prediction=None), stats(decode_tokens=1, decode_s=1.0))
    assert "offload profile" in found.notes[0]
    assert line(found, "decode, tokens/s").predicted is None


def test_it_reads_as_text_and_as_html() -> None:
    found = replace(reconcile(PLAN, stats(decode_tokens=10, decode_s=2.0)), model="<a & b>")
    assert "decode, tokens/s" in str(found)
    page = found._repr_html_()
    assert "&lt;a &amp; b&gt;" in page
    assert page.count("<tr>") == 1 + len(found.lines)
