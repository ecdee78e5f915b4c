"""Checkpoints of benchmarks: which experts their routers prefer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.checkpoints import Shape, ensure_checkpoint
from tests.hf.reference import reference_model

SHAPE = Shape(2, 64, 16, 32, 2, 4, 2, 16, 199, dtype="float32")


def _loads(checkpoint: Path) -> torch.Tensor:
    """Tokens of each expert, [layers, experts], the most popular first."""
    model = reference_model(checkpoint, torch.float32)
    counts = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda _module, _args, out: counts.append(torch.bincount(out[2].flatten(), minlength=SHAPE.experts))
        )
    with torch.no_grad():
        model(torch.randint(SHAPE.vocab, (1, 512), generator=torch.Generator().manual_seed(1)))
    return torch.stack(counts).sort(descending=True).values


def test_a_skewed_router_prefers_some_experts(tmp_path: Path) -> None:
    even, skewed = (ensure_checkpoint(replace(SHAPE, router_skew=skew), tmp_path) for skew in (0.0, 1.0))
    assert even.name != skewed.name
    plain, preferred = _loads(even), _loads(skewed)
    assert (plain.sum(1) == 1024).all() and (preferred.sum(1) == 1024).all()
    quarter = SHAPE.experts // 4
    shares = [loads[:, :quarter].sum(1) / 1024 for loads in (plain, preferred)]
    assert (shares[0] < 0.47).all() and (shares[1] > 0.55).all(), "of the most popular quarter"
    assert torch.equal(_loads(ensure_checkpoint(replace(SHAPE, router_skew=1.0), tmp_path)), preferred)
