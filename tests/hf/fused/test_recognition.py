"""What is recognised is recognised by its behaviour."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from offload.hf.fused.rms_norm import fuse_rms_norms
from offload.hf.fused.rotary import _shared_angles


class _Norm(nn.Module):
    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(40))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class _WithoutEpsilon(_Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).to(x.dtype)


class _Centred(_Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class _InGroups(_Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (2, 20)).float()
        scaled = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.flatten(-2).to(x.dtype)


class _Gated(_Norm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x)


class _Biased(_Norm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.rand(40))


def _count(module: nn.Module) -> int:
    holder: PreTrainedModel = nn.Sequential(module)  # type: ignore[assignment]
    return fuse_rms_norms(holder)


@pytest.mark.parametrize("module", [_WithoutEpsilon(), _Centred(), _InGroups(), _Gated(), _Biased(), _Norm(eps=1)])
def test_other_norms_are_left_alone(module: nn.Module) -> None:
    # An epsilon that is not a float is no epsilon of this kind.
    assert _count(module) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_any_name_is_recognised(dtype: torch.dtype) -> None:
    module = _Norm().to(dtype)
    x = torch.randn(5, 40).to(dtype)
    expected = module(x)
    assert _count(module) == 1
    with torch.no_grad():
        assert torch.allclose(module(x).float(), expected.float(), rtol=1e-6 if dtype is torch.float32 else 1e-2)


def test_settings_of_an_instance_count() -> None:
    near, far = _Norm(eps=1e-6), _Norm(eps=1e-2)
    holder: PreTrainedModel = nn.Sequential(near, far)  # type: ignore[assignment]
    x = 1e-2 * torch.randn(3, 40)
    expected = near(x), far(x)
    assert fuse_rms_norms(holder) == 2
    with torch.no_grad():
        assert torch.allclose(near(x), expected[0]) and torch.allclose(far(x), expected[1])


def _interleaved(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    def turn(x: torch.Tensor) -> torch.Tensor:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * cos[:, None] + turned * sin[:, None]

    return turn(q), turn(k)


def test_another_rotation_is_not_mistaken() -> None:
    assert _shared_angles(_interleaved, torch.float32, torch.float32, 16, 16) is None
    assert _shared_angles(_interleaved, torch.float64, torch.float64, 16, 16) is None
