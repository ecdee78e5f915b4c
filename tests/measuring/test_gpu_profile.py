"""What only a GPU can show: `offload profile` measures it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload.machine_profile import cached_profile, measure_profile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]


def test_the_gpu_is_in_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are those of some card: bounds that none is beyond."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found, _ = measure_profile(tmp_path / "stores", quick=True, say=lambda _what: None)
    assert not any("not measured" in note for note in found.provenance.notes), found.provenance.notes
    gpu, up, down = found.gpu, found.to_gpu, found.from_gpu
    assert gpu is not None and up is not None and down is not None
    assert 0 < gpu.memory_nbytes <= torch.cuda.get_device_properties(0).total_memory
    assert 1e10 < gpu.memory_bytes_per_s < 2e13
    assert [one.format for one in gpu.experts] == ["bf16", "int8", "int4", "fp16"]
    for one in (*gpu.experts, *gpu.linears):
        assert one.curve.seconds_per_weight(1) <= one.curve.seconds_per_weight(128) < 1e-8
    for link in (up, down):
        assert 1e8 < link.overlapped_bytes_per_s <= link.bytes_per_s < 1e12
        assert 0 <= link.latency_s < 1e-2
    assert found.pinned_nbytes > 0
    assert gpu.overheads.layer_s < 0.1
    assert cached_profile(tmp_path / "stores") == found
