"""`offload.load(device="cuda")` from the door to tokens, over a driver that host memory plays, kernels interpreted."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

import offload
from offload.devices import cuda_driver
from offload.devices.pinned import PinnedHostDevice
from offload.errors import DoesNotFitError, SlowDeviceWarning
from tests.conftest import TinyCheckpoint
from tests.devices.fake_cuda import FakeCudaDriver
from tests.hf.reference import greedy, prompt, reference_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/devices/test_on_gpu.py has the real one")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeCudaDriver:
    driver = FakeCudaDriver(total_nbytes=512 << 20)
    monkeypatch.setattr(cuda_driver, "open_cuda", lambda _name: driver)
    return driver


def _load(directory: Path, store_root: Path, **options: object) -> torch.nn.Module:
    return offload.load(  # type: ignore[return-value]
        directory, ram="1GiB", nvme=store_root, context=40, device="cuda:1", **options
    )  # type: ignore[call-overload]


def _least_vram(directory: Path, store_root: Path) -> int:
    with pytest.raises(DoesNotFitError, match=r"bytes of VRAM: .* window of dense layers") as caught:
        _load(directory, store_root, vram="1MiB")
    return int(str(caught.value).split("at least ")[1].split()[0].replace(",", ""))


def test_tokens_equal_transformers_at_any_cap(
    driver: FakeCudaDriver, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    """One family and few tokens: kernels take their time in the interpreter."""
    directory = tiny_checkpoint("mixtral")
    ids = prompt(tokens=4)
    expected = greedy(reference_model(directory, torch.float32), ids, new_tokens=2)
    least = _least_vram(directory, store_root)
    for vram, window in ((least, 2), (None, 0)):
        model = _load(directory, store_root, vram=vram)
        with model.offload as runtime:
            plan = runtime.plan
            assert plan.vram.window_layers == window
            assert plan.vram.use.kv_nbytes
            assert plan.vram.use.total_nbytes <= driver.limit_nbytes == plan.vram.budget_nbytes
            assert vram is None or plan.vram.budget_nbytes == vram
            assert torch.equal(greedy(model, ids, new_tokens=2), expected)
            runtime.check()
            assert runtime.stats().accelerator.hits
            assert driver.pinned


def test_refused_pinning_is_said(driver: FakeCudaDriver, tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    directory = tiny_checkpoint("mixtral")
    driver.pinnable_nbytes = 0
    with pytest.warns(SlowDeviceWarning, match="refused to pin"):
        model = _load(directory, store_root)
    with model.offload as runtime:
        assert isinstance(runtime.device, PinnedHostDevice)
        assert runtime.device.refused_nbytes
        runtime.check()


def test_out_of_memory_while_loading_leaves_nothing_pinned(
    driver: FakeCudaDriver, tiny_checkpoint: TinyCheckpoint, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card has less than it said: the first slab after the link was measured is refused."""
    allocate = driver.allocate

    def fail(nbytes: int) -> torch.Tensor:
        if driver.copies:
            raise torch.OutOfMemoryError("out of memory")
        return allocate(nbytes)

    monkeypatch.setattr(driver, "allocate", fail)
    with pytest.raises(DoesNotFitError, match="in one piece"):
        _load(tiny_checkpoint("mixtral"), store_root)
    gc.collect()
    assert not driver.pinned
