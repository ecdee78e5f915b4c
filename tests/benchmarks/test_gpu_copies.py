"""Rows and targets of copies, over a driver that host memory plays."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_copies import WAYS, copy_table
from benchmarks.harness import Report
from offload.devices.cuda import CudaDevice
from offload.devices.link import CHUNK_NBYTES
from offload.measuring import device_copies
from tests.devices.fake_cuda import FakeCudaDriver

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="`python -m benchmarks gpu` has the real one")


def test_the_runtimes_own_copies_have_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_copies, "MEMORY_NBYTES", 1 << 20)
    driver, report = FakeCudaDriver(), Report("copies")
    device = CudaDevice(driver, 1 << 30)
    driver.copies.clear()
    rows = copy_table(report, device, 1 << 16, rounds=2)
    assert [row["copy"] for row in rows[:2]] == ["one copy", "pieces"]
    assert all(row["GB_per_s"] > 0 and row["share_of_one_copy"] > 0 for row in rows)
    ours = [row for row in rows if row["the_runtimes"]]
    assert [str(row["copy"]).endswith("beside products") for row in ours] == [False, True]
    assert all(f"{device.copy_threads} threads, pieces of 2 MiB" in str(row["copy"]) for row in ours)
    assert len(rows) == 2 + 2 * len(WAYS)
    assert (device.copy_threads, CHUNK_NBYTES) in WAYS
    assert [target.name for target in report.targets] == [f"{row['copy']}: share of the link's rate" for row in ours]
    assert driver.copies, "the runtime's are made by its engine"
