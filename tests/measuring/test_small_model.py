"""Passes of a small model go through the runtime, as often as is asked, and nothing of it is left."""

from __future__ import annotations

from pathlib import Path

from offload.measuring.models import CACHED_TOKENS, CONTEXT_TOKENS
from offload.measuring.small_model import SmallModel


def test_passes_go_on_where_the_context_ends(tmp_path: Path) -> None:
    model = SmallModel(tmp_path)
    try:
        assert list(tmp_path.iterdir()), "its experts are written"
        step, prompt = model.a_pass(1), model.a_pass(64)
        steps = 2 * (CONTEXT_TOKENS - CACHED_TOKENS) + 1
        for _ in range(steps):
            step()
        prompt()
        found = model.runtime.stats()
    finally:
        model.close()
    assert found.decode_tokens == steps
    assert found.prefill_tokens == 3 * CACHED_TOKENS + 64, "a prompt for every sequence that was begun"
    assert found.misses == 0
    assert list(tmp_path.iterdir()) == []
