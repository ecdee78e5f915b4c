"""A profile with a GPU: over a driver that host memory plays, and where something fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.accelerator_profile import with_accelerator
from offload.devices import cuda_driver
from offload.errors import DeviceError
from offload.measuring.cuda_subjects import CudaSubjects
from placement.hardware_profile import HardwareProfile, Overheads
from profiler.effort import Effort
from tests.devices.fake_cuda import FakeCudaDriver
from tests.measuring.small_device import EFFORT, shrink
from tests.placement.machines import machine
from tests.profiler.known import Known

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/measuring/test_gpu_profile.py has the real one"
)

HOST = machine(gpu=False)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeCudaDriver:
    driver = FakeCudaDriver()
    monkeypatch.setattr(cuda_driver, "open_cuda", lambda _name: driver)
    return driver


def _measured(tmp_path: Path, *, gpus: tuple[str, ...] = ("a card 1 GiB",), effort: Effort = EFFORT) -> HardwareProfile:
    return with_accelerator(
        HOST, Known(), tmp_path, gpus=gpus, effort=effort, repeats=1, depths=(1,), say=lambda _what: None
    )


def test_a_gpu_is_in_the_profile(driver: FakeCudaDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are interpreted, so figures mean nothing; curves that do not ascend could not be made."""
    seen: list[tuple[HardwareProfile, str | None]] = []

    def passes(self: CudaSubjects, profile: HardwareProfile, quant: str | None) -> Overheads:
        seen.append((profile, quant))
        return Overheads(1e-3, 1e-4, 0.0)

    monkeypatch.setattr(CudaSubjects, "passes", passes)
    found = _measured(tmp_path)
    assert (found.cpu, found.disk) == (HOST.cpu, HOST.disk)
    gpu, up, down = found.gpu, found.to_gpu, found.from_gpu
    assert gpu is not None and up is not None and down is not None
    assert gpu.memory_nbytes == driver.total_nbytes
    assert [one.format for one in gpu.experts] == [one.format for one in gpu.linears] == ["bf16", "int4", "fp16"]
    assert gpu.overheads == Overheads(1e-3, 1e-4, 0.0)
    assert gpu.packed_overheads is None
    for link in (up, down):
        assert 0 < link.overlapped_bytes_per_s <= link.bytes_per_s
    assert found.pinned_nbytes > 0
    assert [quant for _, quant in seen] == [None]
    assert not any("not measured" in note for note in found.provenance.notes)
    assert HardwareProfile.from_json(found.to_json()) == found
    assert not driver.pinned and driver.memory_nbytes()[0] == driver.total_nbytes


def test_without_a_gpu_nothing_is_said(tmp_path: Path) -> None:
    assert _measured(tmp_path, gpus=()) is HOST


def test_a_gpu_that_cannot_be_used_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_name: str) -> Any:
        raise DeviceError("this torch was built without CUDA")

    monkeypatch.setattr(cuda_driver, "open_cuda", refuse)
    found = _measured(tmp_path)
    (note,) = found.provenance.notes
    assert note.startswith("the GPU was not measured: this torch was built without CUDA")
    assert replace(found, provenance=HOST.provenance) == HOST


@pytest.mark.parametrize("where", ["memory", "kernels", "passes"])
def test_a_gpu_that_fails_leaves_the_hosts_profile(
    where: str, driver: FakeCudaDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise RuntimeError("CUDA error: unspecified\nand more of it")

    monkeypatch.setattr(CudaSubjects, "passes", lambda *_: Overheads(0.0, 0.0, 0.0))
    if where == "memory":
        driver.refuse = 1
    else:
        monkeypatch.setattr(CudaSubjects, {"kernels": "experts", "passes": "passes"}[where], fail)
    found = _measured(tmp_path, effort=replace(EFFORT, formats=("bf16",)))
    (note,) = found.provenance.notes
    assert "the GPU was not measured" in note
    assert ("out of memory" if where == "memory" else "RuntimeError: CUDA error: unspecified") in note
    assert "\n" not in note
    assert replace(found, provenance=HOST.provenance) == HOST
    assert not driver.pinned and driver.memory_nbytes()[0] == driver.total_nbytes
    assert list(tmp_path.iterdir()) == []
