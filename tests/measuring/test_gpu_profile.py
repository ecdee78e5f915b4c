"""What only a GPU can show: its part of a profile, measured with little of everything, so that it ends soon."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload.accelerator_profile import with_accelerator
from offload.measuring import device_copies, device_kernels
from placement.hardware_profile import HardwareProfile
from profiler import accelerator
from profiler.effort import Effort
from tests.placement.machines import machine
from tests.profiler.known import Known

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
    # Kernels are compiled, if Triton has not kept them.
    pytest.mark.timeout(300),
]

LITTLE = Effort((1, 8), 0.005, (), (), 0.0, 64 << 20, ("bf16", "int4"), packed_passes=False, rounds=1)


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_kernels, "COLD_NBYTES", 32 << 20)
    monkeypatch.setattr(device_copies, "MEMORY_NBYTES", 32 << 20)
    monkeypatch.setattr(device_copies, "_PIECE_NBYTES", 32 << 20)
    monkeypatch.setattr(accelerator, "_BESIDE_COPIES", 4)
    for module in (accelerator, device_kernels):
        monkeypatch.setattr(module, "experts_of_call", lambda _tokens: 2)


def test_the_gpu_is_in_the_profile(tmp_path: Path) -> None:
    """Figures are those of some card: bounds that none is beyond. The host's are made up."""
    found = with_accelerator(
        machine(gpu=False), Known(), tmp_path, gpus=("a card",), effort=LITTLE, repeats=3, depths=(1,),
        say=lambda _what: None,
    )  # fmt: skip
    assert not any("not measured" in note for note in found.provenance.notes), found.provenance.notes
    gpu, up, down = found.gpu, found.to_gpu, found.from_gpu
    assert gpu is not None and up is not None and down is not None
    assert 0 < gpu.memory_nbytes <= torch.cuda.get_device_properties(0).total_memory
    assert 1e10 < gpu.memory_bytes_per_s < 2e13
    assert [one.format for one in gpu.experts] == ["bf16", "int4", "fp16"]
    for one in (*gpu.experts, *gpu.linears):
        assert 0 < one.curve.seconds_per_weight(1) <= one.curve.seconds_per_weight(128) < 1e-8
    for link in (up, down):
        assert 1e8 < link.overlapped_bytes_per_s <= link.bytes_per_s < 1e12
        assert 0 <= link.latency_s < 1e-2
    assert found.pinned_nbytes > 0
    assert gpu.overheads.layer_s < 0.1
    assert HardwareProfile.from_json(found.to_json()) == found
    assert list(tmp_path.iterdir()) == []
