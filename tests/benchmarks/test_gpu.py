"""The GPU benchmark runs, gates, and says so where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.harness import GateError
from gpu_kernels.combine import combine

WAYS_TO_RING = ("stream values", "host functions") if torch.cuda.is_available() else ("recorded",)


def test_it_runs_and_gates(tmp_path: Path) -> None:
    report = gpu.run(tmp_path, gpu.QUICK)
    assert [gate.name for gate in report.gates] == [
        *(f"{format}, {tokens} tokens" for format in gpu.QUICK.formats for tokens in (1, 70)),
        *(f"attention, {format}, tiny" for format in gpu.QUICK.kv.formats),
        *(f"doorbell by {way}" for way in WAYS_TO_RING),
        *(
            f"{what}, {share} above{how}"
            for share in ("100%", "50%")
            for what, how in (("logits", ", replayed and not"), ("steps were replayed", ""))
        ),
        *(
            f"tiny, {share:.0%}, {way}"
            for share in gpu.QUICK.models.shares
            for way in ("scheduled", "misses on the CPU", "misses copied, LRU")
            if not torch.cuda.is_available()
        ),
    ]
    models = report.tables["Models"]
    ways = ["scheduled", "scheduled, graphs", "misses on the CPU", "misses copied, LRU", "accelerate"]
    assert [(row["experts_in_vram"], row["way"]) for row in models] == [(s, way) for s in (1.0, 0.5) for way in ways]
    assert [bool(row.get("steps_replayed")) for row in models] == [False, True, False, False, False] * 2
    for row in models:
        assert row.keys() == models[0].keys(), "a table has the columns of its first row"
        assert row["decode_tokens_per_s"] > 0 and row["prefill_tokens_per_s"] > 0
    copied = {row["way"]: row["GB_copied"] for row in models if row["experts_in_vram"] == 0.5}
    assert copied["misses on the CPU"] == 0 < copied["misses copied, LRU"]
    assert [len(rows) for title, rows in report.tables.items() if title.startswith("Experts")] == [2, 2]
    many = report.tables["Experts, many tokens"]
    for row in many:
        assert all(row[name] > 0 for name in row if name.startswith(("TFLOP", "share", "ms")))
        assert row["tokens_of_an_expert"] == 70 * gpu.QUICK.top_k / gpu.QUICK.experts
        # The same time of the same torch's products, whatever the format.
        assert row["TFLOP_per_s_torch_by_expert"] == many[0]["TFLOP_per_s_torch_by_expert"]
        ours = row["share_of_torch_same_shapes"] * row["TFLOP_per_s_torch_by_expert"]
        assert ours == pytest.approx(row["TFLOP_per_s"])
    assert [target.name for target in report.targets if "same shapes" in target.name] == [
        f"{format}, 70 tokens: share of torch's bf16 rate on the same shapes" for format in gpu.QUICK.formats
    ]
    assert len(report.tables["Attention to KV blocks, one new token"]) == 2
    assert [row["way"] for row in report.tables["Requests of a replayed step to the CPU"]] == [*WAYS_TO_RING]
    assert len([target for target in report.targets if target.name.startswith("host microseconds of a layer")]) == 2
    assert len(report.targets) >= 6


def test_what_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "combine", lambda rows, weights, out: combine(rows, 1.1 * weights, out))
    with pytest.raises(GateError, match="largest error"):
        gpu.run(tmp_path, gpu.QUICK)


def test_without_a_gpu_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "interpreting", lambda: False)
    report = gpu.run(tmp_path, gpu.FULL)
    assert report.notes == [gpu.NOT_MEASURED]
    assert not report.tables
    assert not report.targets
