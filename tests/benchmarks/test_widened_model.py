"""Widened experts compute what trained ones do, so the routing stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.trace_recording import MODEL, record
from benchmarks.widened_model import ensure_widened
from tests.hf.reference import logits, prompt, reference_model


def test_a_widened_model_computes_and_routes_as_the_trained_one(tmp_path: Path) -> None:
    directory = ensure_widened(tmp_path, 4)
    assert ensure_widened(tmp_path, 4) == directory
    trained, widened = (reference_model(path, torch.float32) for path in (MODEL, directory))
    assert widened.config.moe_intermediate_size == 4 * trained.config.moe_intermediate_size
    ids = prompt(tokens=24)
    expected, found = logits(trained, ids), logits(widened, ids)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    one, other = (record(model, ids[0].tolist(), 8, "") for model in (trained, widened))
    assert (one.experts == other.experts).all()
    assert one.ahead is not None
    assert one.ahead.shape == (17, 6, 3, 16)
    assert not one.ahead[0].any(), "of a prefill nothing is foreseen"
    assert not one.ahead[:, 5].any()
    with pytest.raises(ValueError, match="power of two"):
        ensure_widened(tmp_path, 3)


def test_logits_ahead_are_what_later_routers_say(tmp_path: Path) -> None:
    model = reference_model(MODEL, torch.float32)
    seen: list[torch.Tensor] = []
    router = model.get_submodule("model.layers.1.mlp.gate")
    router.register_forward_hook(lambda _router, args, _output: seen.append(args[0]))
    ids = prompt(tokens=12)
    trace = record(model, ids[0].tolist(), 4, "")
    later = model.get_submodule("model.layers.3.mlp.gate")
    with torch.no_grad():
        expected = later(seen[0])[0][4:]
    assert trace.ahead is not None
    assert torch.allclose(torch.from_numpy(trace.ahead[1:, 1, 1]).float(), expected, atol=0.02)
