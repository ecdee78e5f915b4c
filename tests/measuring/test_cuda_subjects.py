"""What is measured of a GPU is the runtime's device and computes what it says, over a driver that host memory plays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gpu_kernels.expert_mlp_reference import expert_mlp_reference
from offload.devices import cuda_driver
from offload.devices.base import ExpertBatch
from offload.devices.cuda import CudaDevice
from offload.errors import SlowDeviceWarning
from offload.measuring import device_copies, kernels
from offload.measuring.cuda_subjects import CudaSubjects
from offload.measuring.device_copies import DeviceCopies
from offload.measuring.device_kernels import DeviceLinears, SlotCalls, device_attention
from offload.moe.layer import ExpertsLayer
from placement.hardware_profile import Overheads
from tests.devices.fake_cuda import FakeCudaDriver
from tests.measuring.small_device import shrink
from tests.placement.machines import machine

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_profile.py has the real one")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture
def driver() -> FakeCudaDriver:
    return FakeCudaDriver()


Call = tuple[ExpertsLayer, ExpertBatch, torch.Tensor, torch.Tensor]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What the device was asked to compute, which it does."""
    calls: list[Call] = []
    run = CudaDevice.run_experts

    def noted(self: CudaDevice, *arguments: object) -> None:
        calls.append(arguments)  # type: ignore[arg-type]
        run(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CudaDevice, "run_experts", noted)
    return calls


@pytest.mark.parametrize("format", ["bf16", "fp32", "int4", "fp8_e4m3"])
def test_experts_are_the_devices_on_other_slots_each_time(format: str, driver: FakeCudaDriver, ran: list[Call]) -> None:
    calls = SlotCalls(CudaDevice(driver, 1 << 30), format, narrow=False)
    product = calls.product(3, 2)
    assert (product.weights, product.calls) == (3 * 3 * 128 * 64, 1)
    assert product.entries == 3 * (128 + 3 * 64)
    product.run()
    product.run()
    (layer, batch, hidden, out), (_, next_batch, _, _) = ran
    assert not set(batch.addresses.tolist()) & set(next_batch.addresses.tolist())
    assert np.diff(batch.offsets).sum() == 6 and np.ptp(np.diff(batch.offsets)) > 0, "uneven, as a router makes them"
    bundle = kernels.random_bundle(layer.layout)
    expected = expert_mlp_reference(bundle, layer.layout, hidden, "silu", rounded=False)
    torch.testing.assert_close(out.double(), expected[batch.tokens], rtol=2e-2, atol=1e-4)


def test_narrow_experts_are_narrow(driver: FakeCudaDriver) -> None:
    product = SlotCalls(CudaDevice(driver, 1 << 30), "bf16", narrow=True).product(2, 1)
    assert (product.weights, product.entries) == (2 * 3 * 64 * 32, 2 * (64 + 3 * 32))


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_linears_wait_once_for_some_in_a_row(format: str) -> None:
    finished: list[int] = []
    calls = DeviceLinears(format, 32, torch.device("cpu"))
    seen: list[int] = []
    for number, layer in enumerate(calls._layers):
        layer.register_forward_hook(lambda *_, number=number: seen.append(number))
    product = calls.product(3, lambda: finished.append(len(seen)))
    assert (product.weights, product.entries) == (32 * 128, 32 + 128)
    product.run()
    product.run()
    assert finished == [product.calls, 2 * product.calls]
    assert len(set(seen)) == 2 * product.calls, "every call takes other weights"
    held = [next(iter(layer.state_dict().values()), getattr(layer, "codes", None)) for layer in calls._layers]
    assert len({tensor.data_ptr() for tensor in held if tensor is not None}) == len(held)


def test_attention_counts_its_flops_and_waits_once() -> None:
    finished: list[None] = []
    one = device_attention(1, 15, torch.device("cpu"), lambda: finished.append(None))
    assert one.kv_nbytes == 16 * kernels.KV_HEADS * kernels.HEAD_WIDTH * 4
    assert one.flops == pytest.approx(4 * kernels.HEADS * kernels.HEAD_WIDTH * 16)
    prompt = device_attention(8, 0, torch.device("cpu"), lambda: finished.append(None))
    assert prompt.flops == pytest.approx(4 * kernels.HEADS * kernels.HEAD_WIDTH * sum(range(1, 9)))
    narrow = device_attention(8, 0, torch.device("cpu"), lambda: finished.append(None), narrow=True)
    assert narrow.scores == prompt.scores == kernels.HEADS * sum(range(1, 9))
    assert narrow.flops / prompt.flops == kernels.NARROW_HEAD_WIDTH / kernels.HEAD_WIDTH
    one.run()
    prompt.run()
    narrow.run()
    assert len(finished) == 3


def test_copies_are_the_runtimes(driver: FakeCudaDriver) -> None:
    copies = DeviceCopies(CudaDevice(driver, 1 << 30))
    driver.copies.clear()
    for pinned in (True, False):
        below, above = copies._below[pinned], copies._above
        below.bytes()[:] = np.random.default_rng(pinned).integers(0, 256, below.nbytes, np.uint8)
        above.tensor().fill_(0)
        copies._next = 0
        assert copies.copy(4096, 3, up=True, pinned=pinned) > 0
        assert (below.address in driver.pinned) == pinned
        assert np.array_equal(above.tensor()[: 3 * 4096].numpy(), below.bytes()[: 3 * 4096])
        assert not above.tensor()[3 * 4096 :].any()
    assert len(driver.copies) == 6, "each a piece of a stream"
    above.tensor().fill_(7)
    copies._next = 0
    assert copies.copy(4096, 2, up=False, pinned=True) > 0
    assert (copies._below[True].bytes()[: 2 * 4096] == 7).all()
    assert len(driver.copies) == 8
    assert copies.copy(4096, 2, up=False, pinned=False) > 0
    assert len(driver.copies) == 8, "torch's own"
    with pytest.raises(ValueError, match="1,048,576"):
        copies.copy(2 << 20, 1, up=True, pinned=True)
    copies.close()
    del copies
    assert not driver.pinned


@pytest.mark.parametrize(("wanted", "locked"), [(1 << 20, 1 << 20), (5 << 20, 3 << 20), (3000, 3000)])
def test_memory_is_locked_as_far_as_it_goes_and_let_go(wanted: int, locked: int, driver: FakeCudaDriver) -> None:
    copies = DeviceCopies(CudaDevice(driver, 1 << 30))
    held = dict(driver.pinned)
    driver.pinnable_nbytes = sum(held.values()) + (3 << 20) + 1000
    assert copies.lock_memory(wanted) == locked
    assert driver.pinned == held
    copies.close()


def test_memory_that_is_not_locked_is_said(driver: FakeCudaDriver) -> None:
    driver.pinnable_nbytes = 0
    with pytest.warns(SlowDeviceWarning, match="refused to pin"):
        copies = DeviceCopies(CudaDevice(driver, 1 << 30))
    assert copies.copy(4096, 1, up=True, pinned=True) > 0
    assert copies.lock_memory(1 << 20) == 0
    copies.close()


def test_one_format_is_held_at_a_time_and_all_is_given_back(driver: FakeCudaDriver, tmp_path: Path) -> None:
    with CudaSubjects(driver, "cuda", tmp_path, repeats=1) as subjects:
        assert (subjects.name, subjects.memory_nbytes) == ("a fake", 1 << 30)
        subjects.experts("bf16", 1, 1)
        subjects.experts("bf16", 1, 1, narrow=True)
        held = driver.memory_nbytes()[0]
        subjects.experts("int4", 1, 1)
        assert driver.memory_nbytes()[0] > held
        subjects.linear("int4", 32, 1).run()
        subjects.attention(1, 3).run()
        assert 1e6 < subjects.stream() < 1e14
        assert subjects.copy(4096, 1, up=False, pinned=True) > 0
    assert driver.memory_nbytes()[0] == 1 << 30
    assert not driver.pinned
    assert device_copies.MEMORY_NBYTES == 1 << 20


@pytest.mark.parametrize("depths", [(1,)])
def test_overheads_are_of_passes_with_everything_above(
    depths: tuple[int, ...], driver: FakeCudaDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes that are predicted to take no time to speak of leave all their seconds as overheads."""
    monkeypatch.setattr(cuda_driver, "open_cuda", lambda _name: driver)
    profile = machine(ram=1e15, vram=1e15, link=1e15, cpu_flops=1e18)
    subjects = CudaSubjects(driver, "cuda", tmp_path, repeats=1, depths=depths)
    found = subjects.passes(profile, None)
    assert isinstance(found, Overheads)
    assert found.layer_s > 0
    assert found.prompt_layer_s is not None and found.prompt_layer_s >= 0
    assert min(found.pass_s, found.element_s, found.step_s, found.arrival_s) >= 0
    assert driver.limit_nbytes == driver.total_nbytes, "what bounded the models bounds nobody else"
    assert list(tmp_path.iterdir()) == []
