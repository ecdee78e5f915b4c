"""Host memory as an accelerator's: its budget, and that it computes from its own memory only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from formats.kv import KvLayout
from offload.devices.base import AttentionBatch, ExpertBatch
from offload.devices.host_accelerator import HostAccelerator
from offload.devices.link import Link
from offload.errors import DoesNotFitError
from tests.moe.rig import Rig


def test_the_budget_holds() -> None:
    device = HostAccelerator(3 * 4096, Link(1e9))
    device.allocate(2 * 4096)
    with pytest.raises(DoesNotFitError, match="8,192 are in use"):
        device.allocate(2 * 4096)
    device.allocate(4096)


def test_experts_must_be_in_its_own_memory() -> None:
    rig = Rig(slots=2)
    device = HostAccelerator(1 << 20, Link(1e9))
    slabs = [device.allocate(rig.layout.nbytes) for _ in range(3)]
    bundle = rig.reader.shard[: rig.layout.nbytes]
    hidden = torch.randn(1, rig.layout.hidden)

    def run(address: int) -> torch.Tensor:
        out = torch.full((1, rig.layout.hidden), torch.nan)
        zero = np.zeros(1, np.int64)
        batch = ExpertBatch(np.array([address], np.intp), np.array([0, 1], np.int64), zero, zero)
        device.run_experts(rig.layers[0], batch, hidden, out)
        return out

    expected = rig.reference(0, hidden, torch.tensor([[0]]), torch.ones(1, 1))
    for slab in slabs:
        slab.bytes()[: len(bundle)] = bundle
        rig.assert_close(run(slab.address), expected)
    for slab in slabs:
        with pytest.raises(ValueError, match="not in the accelerator's memory"):
            run(slab.address + 4096)
    with pytest.raises(ValueError, match="not in the accelerator's memory"):
        run(rig.reader.shard.ctypes.data)
    device.synchronise()
    rig.close()


def test_kv_blocks_must_be_in_its_own_memory() -> None:
    device, layout = HostAccelerator(1 << 20, Link(1e9)), KvLayout("fp32", 2, 16, 16)
    slab = device.allocate(2 * layout.nbytes)
    positions = np.array([[63]], np.int64)

    def attend(address: int) -> AttentionBatch:
        lists = np.array([0, 1]), np.array([address]), np.array([64]), np.zeros(1, np.int64)
        return AttentionBatch(torch.randn(1, 4, 1, 16), *lists, positions, layout, 0.3, None)

    for address in (slab.address, slab.address + layout.nbytes):
        assert device.start_attention(attend(address)).finish()[0].shape == (1, 4, 1, 16)
    for address in (slab.address - layout.nbytes, slab.address + slab.nbytes - 4096):
        with pytest.raises(ValueError, match=r"a KV block at address .* is not in the accelerator's memory"):
            device.start_attention(attend(address))
        with pytest.raises(ValueError, match=r"a KV block at address .* is not in the accelerator's memory"):
            device.read_blocks(np.array([address]), 64, layout)
