"""The CUDA device over a fake driver: its memory, copies, experts in Triton's interpreter, and what goes wrong."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from formats.bundle import BundleLayout
from gpu_kernels.grouping import FEW_PAIRS
from offload.devices import cuda_experts
from offload.devices.base import ExpertBatch
from offload.devices.cuda import CudaDevice
from offload.devices.cuda_driver import open_cuda
from offload.devices.link import CHUNK_NBYTES
from offload.devices.pinned import PinnedHostDevice, PinnedSlab
from offload.errors import DeviceError, DoesNotFitError, SlowDeviceWarning, UnsupportedOperationError
from offload.measuring.kernels import Gate
from offload.moe.layer import ExpertsLayer
from offload.moe.tiered_step import Accelerated, retried_step
from offload.tiers.accelerated import TierPair
from offload.tiers.arena import Arena
from offload.tiers.expert_tier import ExpertTier
from offload.tiers.transfer import ReadEngine, ReadRequest, Urgency
from prefetch.policies.lru import LruPolicy
from tests.devices.fake_cuda import FakeCudaDriver
from tests.gpu_kernels.bundles import random_bundle
from tests.moe.rig import Rig
from tests.moe.tiered_rig import COPY_ALL, COPY_NONE, COPY_SOME, FixedCosts
from tests.tiers.readers import random_bytes

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the fake's memory is the host's, which compiled kernels do not read"
)


class CudaRig(Rig):
    """A rig with a CUDA device above."""

    def __init__(self, *, above: int, costs: object = COPY_SOME, slab_slots: int = 2, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.driver = FakeCudaDriver()
        self.cuda = CudaDevice(self.driver, above * self.layout.nbytes)
        self.cuda.slab_nbytes = slab_slots * self.layout.nbytes
        self.copies = ReadEngine(self.cuda.copy_reader(), threads=self.cuda.copy_threads, chunk_nbytes=4096)
        arena = Arena(self.cuda, self.layout.nbytes, above)
        upper = ExpertTier(arena, LruPolicy(), self.copies, self._locate_below, lambda _key: self.layout.nbytes)
        self.pair = TierPair(upper, self.tier)
        self.accelerated = Accelerated(self.pair, self.device, self.cuda, FixedCosts(costs))  # type: ignore[arg-type]

    def _locate_below(self, key: int, out: torch.Tensor) -> ReadRequest:
        return ReadRequest(0, self.tier.address(key), out, None, f"the copy of expert {key}")

    def tiered(self, layer: int, *inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return retried_step(self.layers[layer], self.accelerated, *inputs)

    def assert_idle(self) -> None:
        super().assert_idle()
        self.pair.check()
        assert not self.pair.above.table.pinned

    def close(self) -> None:
        self.copies.close()
        super().close()


@needs_interpreter
@pytest.mark.parametrize("costs", [COPY_ALL, COPY_NONE, COPY_SOME], ids=["all", "none", "some"])
def test_a_step_over_three_tiers(costs: object) -> None:
    rig = CudaRig(above=4, costs=costs, slots=3)
    rig.pair.preload([0, 2], lambda _key: None)
    for seed in range(4):
        inputs = rig.inputs(3, 3, seed=seed)
        rig.assert_close(rig.tiered(0, *inputs), rig.reference(0, *inputs))
        rig.assert_idle()
    assert rig.pair.above.counters.hits
    rig.close()


@needs_interpreter
@pytest.mark.parametrize("kind", ["gpt_oss", "no gate", "unknown"])
def test_kinds_of_experts(kind: str) -> None:
    rig = CudaRig(above=4, costs=COPY_ALL, slots=3, kind=kind)
    inputs = rig.inputs(2, 2)
    rig.assert_close(rig.tiered(0, *inputs), rig.reference(0, *inputs))
    rig.close()


@needs_interpreter
def test_packed_experts_have_the_bytes_of_the_store() -> None:
    """The outputs are those of the kernels' reference, to which `tests/gpu_kernels` holds them."""
    layout = BundleLayout(64, 48, "int4")
    driver = FakeCudaDriver()
    device = CudaDevice(driver, 2 * layout.nbytes)
    slab = device.allocate(layout.nbytes)
    bundle = random_bundle(layout, 1)
    slab.tensor().copy_(torch.from_numpy(bundle))
    layer = ExpertsLayer("experts", 0, 1, layout, torch.bfloat16, torch.nn.Module(), "silu")
    hidden = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.full((3, 64), torch.nan)
    batch = ExpertBatch(np.array([slab.address]), np.array([0, 2]), np.array([1, 0]), np.array([2, 0]))
    work = device.start_experts(layer, batch, hidden, out)
    assert out.isnan().all()
    work.finish()
    from gpu_kernels.expert_mlp_reference import expert_mlp_reference

    expected = expert_mlp_reference(bundle, layout, hidden, "silu", rounded=False)
    torch.testing.assert_close(out[[2, 0]].double(), expected[[1, 0]], rtol=2e-2, atol=2e-2)
    assert out[1].isnan().all()


@needs_interpreter
def test_out_of_memory_gives_up_a_slab_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = CudaRig(above=6, costs=COPY_ALL, slots=3)
    rig.pair.preload(range(6), lambda _key: None)
    inputs = rig.inputs(3, 3)
    expected = rig.reference(0, *inputs)
    start, failures = CudaDevice.start_experts, [2]

    def fail(self: CudaDevice, *arguments: object) -> object:
        if failures[0]:
            failures[0] -= 1
            raise torch.OutOfMemoryError("out of memory")
        return start(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CudaDevice, "start_experts", fail)
    failures[0] = 1
    with pytest.warns(SlowDeviceWarning, match="2 expert slots were given up, 4 are left"):
        rig.assert_close(rig.tiered(0, *inputs), expected)
    rig.assert_idle()
    assert rig.driver.trims == 1
    failures[0] = 2
    with pytest.warns(SlowDeviceWarning, match="2 are left"), pytest.raises(torch.OutOfMemoryError):
        rig.tiered(0, *inputs)
    rig.assert_idle()
    failures[0] = 1
    with pytest.raises(DoesNotFitError, match="the last slab of 2 expert slots is needed"):
        rig.tiered(0, *inputs)
    rig.assert_idle()
    rig.assert_close(rig.tiered(0, *inputs), expected)
    rig.close()


def test_the_budget_holds_and_a_refusal_of_the_card_is_named() -> None:
    driver = FakeCudaDriver()
    device = CudaDevice(driver, 3 * 4096)
    device.allocate(2 * 4096)
    with pytest.raises(DoesNotFitError, match="8,192 are in use"):
        device.allocate(2 * 4096)
    driver.refuse = 1
    with pytest.raises(DoesNotFitError, match="in one piece"):
        device.allocate(4096)
    slab = device.allocate(4096)
    with pytest.raises(UnsupportedOperationError, match="not the host's memory"):
        slab.bytes()
    slab.discard(0, 1024)
    assert driver.trims == 0
    slab.discard(0, 4096)
    assert driver.trims == 1
    with pytest.raises(UnsupportedOperationError, match="given back"):
        slab.span(0, 16)
    assert device.link.bytes_per_s > 0


def test_the_link_is_measured_with_copies_as_the_runtime_makes_them() -> None:
    """In pieces, on the streams of the engine's threads; one large copy would promise what no expert gets."""
    driver = FakeCudaDriver()
    device = CudaDevice(driver, 1 << 20)
    assert {nbytes for _, nbytes in driver.copies} == {CHUNK_NBYTES}
    assert device.link.bytes_per_s > 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("offload-reader")]


def test_pieces_of_an_urgent_copy_overtake() -> None:
    driver = FakeCudaDriver()
    device = CudaDevice(driver, 1 << 20)
    driver.copies.clear()
    slab, source = device.allocate(16 * 4096), random_bytes(16 * 4096, seed=1)
    engine = ReadEngine(device.copy_reader(), threads=1, chunk_nbytes=4096)
    engine.hold()
    engine._queue.lock.release()

    def request(first: int, last: int) -> ReadRequest:
        span = slab.span(first * 4096, (last - first) * 4096)
        return ReadRequest(0, source.ctypes.data + first * 4096, span, None, "")

    later = engine.submit(request(0, 12), Urgency.SOON)
    urgent = engine.submit(request(12, 16), Urgency.NOW)
    engine._queue.lock.acquire()
    engine.let_go()
    engine.wait_all([later, urgent])
    engine.close()
    order = [(address - source.ctypes.data) // 4096 for address, _ in driver.copies]
    assert sorted(order[:4]) == [12, 13, 14, 15]
    assert np.array_equal(slab.tensor().numpy(), source)
    assert engine.reader.bytes_read == 16 * 4096


def test_pinned_memory_is_unlocked_before_any_of_it_goes() -> None:
    driver = FakeCudaDriver()
    device = PinnedHostDevice(driver)
    slabs = [device.allocate(8192) for _ in range(2)]
    assert [*driver.pinned.values()] == [8192, 8192]
    slabs[0].bytes()[:] = 7
    slabs[0].discard(4096, 4096)
    assert [*driver.pinned] == [slabs[1].address]
    assert slabs[0].bytes()[:4096].all()
    assert not slabs[0].bytes()[4096:].any()
    slabs[0].discard(0, 8192)
    del slabs
    assert not driver.pinned


def test_refused_pinning_warns_once_and_goes_on() -> None:
    device = PinnedHostDevice(FakeCudaDriver(pinnable_nbytes=8192))
    first = device.allocate(8192)
    with pytest.warns(SlowDeviceWarning, match="refused to pin"):
        second = device.allocate(4096)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        device.allocate(4096)
    assert isinstance(first, PinnedSlab)
    assert not isinstance(second, PinnedSlab)
    assert device.refused_nbytes == 8192


@needs_interpreter
def test_kernels_run_ahead_with_every_number_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeCudaDriver()
    started: list[int] = []
    work = cuda_experts.CudaWork

    def counted(*args: Any) -> Any:
        started.append(len(args[2].tokens))
        return work(*args)

    monkeypatch.setattr(cuda_experts, "CudaWork", counted)
    layout = BundleLayout(16, 16, "fp32")
    layers = [ExpertsLayer(f"layer {i}", 4 * i, 4, layout, torch.float32, Gate(), "silu") for i in range(3)]
    cuda_experts.warm_up(driver, layers, 3)
    assert started == [1, 2, 3, FEW_PAIRS + 1], "layers that are alike once"


def test_a_closed_model_leaves_torch_the_card() -> None:
    driver = FakeCudaDriver()
    device = CudaDevice(driver, 1 << 18, 1 << 28)
    assert driver.limit_nbytes == 1 << 28
    for _ in range(2):
        device.release()
        assert driver.limit_nbytes == driver.total_nbytes


def test_a_closed_model_leaves_others_what_they_claimed() -> None:
    driver = FakeCudaDriver()
    first, second = CudaDevice(driver, 1 << 18, 1 << 28), CudaDevice(driver, 1 << 18, 1 << 27)
    assert driver.limit_nbytes == (1 << 28) + (1 << 27)
    CudaDevice(driver, 1 << 18).release()
    first.release()
    first.release()
    assert driver.limit_nbytes == 1 << 27
    second.release()
    assert driver.limit_nbytes == driver.total_nbytes


def test_a_device_that_cannot_be_opened_claims_nothing() -> None:
    driver = FakeCudaDriver()
    driver.refuse = 1
    with pytest.raises(torch.OutOfMemoryError):
        CudaDevice(driver, 1 << 18, 1 << 28)
    assert driver.limit_nbytes == driver.total_nbytes


@pytest.mark.parametrize("name", ["gpu", "cpu", "cuda:", "cuda:x"])
def test_names_that_are_no_devices(name: str) -> None:
    with pytest.raises(DeviceError, match="expected"):
        open_cuda(name)


@pytest.mark.parametrize(
    ("version", "available", "count", "name", "message"),
    [
        (None, False, 0, "cuda", "built without CUDA"),
        ("13.0", False, 0, "cuda", "finds no CUDA device"),
        ("13.0", True, 2, "cuda:2", '"cuda:0" to "cuda:1"'),
    ],
)
def test_what_is_not_there_is_said(
    version: str | None, available: bool, count: int, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(DeviceError, match=message):
        open_cuda(name)


def test_a_device_that_is_there_is_opened_by_its_index_and_the_current_one_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for name, index in (("cuda:1", 1), ("cuda:0", 0), ("cuda", 3)):
        assert open_cuda(name).device == torch.device("cuda", index)
