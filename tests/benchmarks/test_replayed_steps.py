"""Replayed steps are timed where a GPU plays the accelerator too, which has more in its memory than weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_models, replayed_steps
from benchmarks.harness import Report
from offload.devices import cuda_driver
from tests.devices.fake_cuda import FakeCudaDriver


@pytest.mark.skipif(torch.cuda.is_available(), reason="`python -m benchmarks gpu` has the real one")
def test_over_a_driver_that_host_memory_plays(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "open_cuda", lambda _name: FakeCudaDriver(total_nbytes=2 << 30))
    monkeypatch.setattr(replayed_steps, "accelerator", lambda: "cuda:1")
    report, shape = Report("steps"), replace(gpu_models.TINY, dtype="float32")
    scale = replayed_steps.ReplayScale(steps=2, before=2, columns=16, rounds=1)
    replayed_steps.step_tables(report, work, shape, scale)
    (rows,) = report.tables.values()
    assert [row["experts above"] for row in rows] == [1.0, 0.5]
    assert [target.name.split(",")[0] for target in report.targets] == [
        "host microseconds of a layer between replayed steps"
    ] * 2
    assert [gate.name for gate in report.gates if gate.name.startswith("steps")] == [
        f"steps were replayed, {share} above" for share in ("100%", "50%")
    ]
