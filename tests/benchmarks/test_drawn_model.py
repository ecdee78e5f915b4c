"""A model that is drawn routes as it was given to, here as published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.drawn_model import DrawnModel, ensure_drawn
from benchmarks.trace_recording import record
from prefetch.policies.named import make_policy
from prefetch.traces.replay import replay
from tests.hf.reference import reference_model

SMALL = replace(DrawnModel(), hidden=256, intermediate=32, heads=8, head_dim=32, tokens=256)


def test_a_drawn_models_routing_has_published_statistics(tmp_path: Path) -> None:
    directory = ensure_drawn(tmp_path, SMALL)
    assert ensure_drawn(tmp_path, SMALL) == directory
    model = reference_model(directory, torch.float32)
    with torch.no_grad():
        trace = record(model, list(range(SMALL.tokens)), 1, SMALL.name)
    assert trace.ahead is not None
    chosen = trace.experts.reshape(SMALL.tokens, SMALL.layers, SMALL.top_k)
    again = np.mean([len(set(new) & set(old)) for old, new in zip(_sets(chosen[:-1]), _sets(chosen[1:]), strict=True)])
    # 18 to 43% of a token's experts are those of the token before.
    assert 0.18 < again / SMALL.top_k < 0.43
    # The next layer's router, asked about this layer's hidden state, names 81 to 89% of its experts.
    said = trace.ahead[1:, :-1, 0].astype(np.float32).argsort(-1)[..., -SMALL.top_k :]
    pairs = zip(_sets(said), _sets(chosen[1:, 1:]), strict=True)
    assert 0.81 < np.mean([len(set(named) & set(needed)) for named, needed in pairs]) / SMALL.top_k < 0.89
    # LRU hits 45.0% (Qwen2-57B) to 47.7% (DeepSeek-V2-Lite) with a quarter of the experts.
    slots = trace.geometry.total // 4
    assert 0.43 < replay(trace, make_policy("lru", trace.geometry), slots).decode_hit_rate < 0.50


def _sets(chosen: np.ndarray) -> list[list[int]]:
    """Experts of each token and layer."""
    found: list[list[int]] = chosen.reshape(-1, chosen.shape[-1]).tolist()
    return found
