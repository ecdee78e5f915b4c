"""Cached states answer what they are asked, and become tensors for whoever computes with them."""

from __future__ import annotations

import torch

from offload.hf.paged.states import CachedStates, cached_states


def _states() -> tuple[CachedStates, torch.Tensor, list[int]]:
    values, asked = torch.arange(24.0).view(1, 2, 3, 4), [0]

    def gather() -> torch.Tensor:
        asked[0] += 1
        return values

    return cached_states((1, 2, 3, 4), torch.zeros(1), None, gather), values, asked


def test_shape_dtype_and_device_need_no_values() -> None:
    states, _, asked = _states()
    assert states.shape == (1, 2, 3, 4) and states.size(2) == 3 and states.dim() == 4 and len(states) == 1
    assert states.dtype is torch.float32 and states.device.type == "cpu" and states.is_cpu
    assert "2, 3, 4" in repr(states)
    assert asked == [0]


def test_whatever_computes_with_them_gets_the_values() -> None:
    states, values, asked = _states()
    assert torch.equal(states * 2, values * 2)
    assert torch.equal(torch.cat([states, values], 2), torch.cat([values, values], 2))
    assert torch.equal(states[:, 1:], values[:, 1:])
    assert torch.equal(values @ states.transpose(2, 3), values @ values.mT)
    assert type(states.clone()) is torch.Tensor
    assert asked == [5]


def test_no_memory_is_held() -> None:
    states = cached_states((4, 8, 100_000, 128), torch.zeros(1, dtype=torch.bfloat16), None, lambda: torch.zeros(1))
    with torch._C.DisableTorchFunctionSubclass():
        assert states.untyped_storage().nbytes() == 2
