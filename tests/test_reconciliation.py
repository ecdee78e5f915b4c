"""Predicted beside measured: figures that must come out, from made-up runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from offload.reconciliation import MemoryUse, Reconciliation, reconcile, reconcile_phases
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


def test_a_tape_tells_no_terms_apart() -> None:
    found = reconcile(PLAN, stats(decode_tokens=10, decode_s=2.0, moe_steps=30, moe_s=0.0))
    assert PLAN.prediction is not None
    told = PLAN.prediction.decode
    whole = line(found, "decode, all but reads, ms a token")
    assert whole.measured == pytest.approx(200)
    assert whole.predicted == pytest.approx(1e3 * (told.seconds - told.terms.disk_s) / told.tokens)
    assert not [entry for entry in found.lines if "experts" in entry.name]


def test_phases_that_were_counted_apart_have_their_terms() -> None:
    prefill = stats(prefill_tokens=64, prefill_s=0.64, moe_s=0.32, bytes_read=64 << 20)
    decode = stats(decode_tokens=10, decode_s=2.0, moe_s=1.2, read_stall_s=0.5)
    found = reconcile_phases(PLAN, prefill, decode, None)
    assert line(found, "decode, tokens/s").measured == 5.0
    assert line(found, "prefill, tokens/s").measured == pytest.approx(100)
    assert line(found, "decode, experts, ms a token").measured == pytest.approx(70)
    assert line(found, "prefill, MiB read a token").measured == 1.0
    assert found.as_dict()["figures"]["decode, tokens/s"]["measured"] == 5.0


@pytest.mark.parametrize(("peak", "measured"), [(700 << 20, 700), (600 << 20, None)])
def test_the_peak_is_of_the_process_and_since_loading_began(peak: int, measured: float | None) -> None:
    memory = MemoryUse(before_nbytes=400 << 20, peak_before_nbytes=600 << 20, peak_nbytes=peak)
    found = line(reconcile(PLAN, stats(), memory), "peak RSS, MiB")
    assert found.predicted == pytest.approx(400 + PLAN.workload_peak_ram_nbytes / (1 << 20))
    assert found.measured == measured


def test_the_process_is_looked_at() -> None:
    before = MemoryUse.now()
    assert before.measured_nbytes is None
    held = bytearray(b"x" * (64 << 20))
    after = before.until_now()
    assert after.peak_nbytes >= before.before_nbytes + len(held) // 2
    assert after.before_nbytes == before.before_nbytes


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
