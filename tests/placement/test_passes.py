"""Passes of a workload, against counting token by token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.passes import Pass, decode_pass, prefill_passes
from placement.workload import Workload


@given(st.integers(1, 60), st.integers(0, 80), st.one_of(st.none(), st.integers(1, 60)))
def test_attended_pairs_are_counted(new: int, cached: int, window: int | None) -> None:
    counted = sum(min(cached + i, window or 10**9) for i in range(1, new + 1))
    assert Pass(2, new, float(cached)).attended_pairs(window) == pytest.approx(counted)


def test_the_window_bounds_what_is_seen() -> None:
    assert Pass(1, 4, 100.0).visible_tokens(None) == 104
    assert Pass(1, 4, 100.0).visible_tokens(64) == 64


@given(st.integers(1, 5000), st.integers(1, 1200), st.integers(1, 4), st.integers(1, 6000))
def test_chunks_make_up_the_prompt(prompt: int, chunk: int, batch: int, context: int) -> None:
    work = Workload(context, batch, chunk, prompt)
    passes = prefill_passes(work)
    prompt = min(prompt, context)
    assert sum(one.new_tokens * one.count for one in passes) == prompt
    # Attention does not depend on the cuts.
    whole = Pass(batch, prompt, 0.0).attended_pairs(None)
    assert sum(one.count * one.attended_pairs(None) for one in passes) == pytest.approx(whole)
    assert all(one.new_tokens <= chunk and one.batch == batch for one in passes)


def test_decode_is_half_way_through_the_new_tokens() -> None:
    assert decode_pass(Workload(4096, 3, prompt_tokens=100, new_tokens=50)) == Pass(3, 1, 125.0)
    assert decode_pass(Workload(64, prompt_tokens=100)).cached_tokens == 64
