"""The GPU benchmark runs, gates, and says so where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu
from benchmarks.harness import GateError
from gpu_kernels.combine import combine


def test_it_runs_and_gates() -> None:
    report = gpu.run(gpu.QUICK)
    assert [gate.name for gate in report.gates] == [
        f"{format}, {tokens} tokens" for format in gpu.QUICK.formats for tokens in (1, 70)
    ]
    assert [len(rows) for title, rows in report.tables.items() if title.startswith("Experts")] == [2, 2]
    assert len(report.targets) >= 4


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "combine", lambda rows, weights, out: combine(rows, 1.1 * weights, out))
    with pytest.raises(GateError, match="largest error"):
        gpu.run(gpu.QUICK)


def test_without_a_gpu_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "interpreting", lambda: False)
    report = gpu.run(gpu.FULL)
    assert report.notes == [gpu.NOT_MEASURED]
    assert not report.tables
    assert not report.targets
