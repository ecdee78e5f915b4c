"""What is done before passes is not in their seconds."""

from __future__ import annotations

import pytest

from offload.measuring import models
from offload.measuring.models import measure_model, random_model


@pytest.mark.parametrize(("tokens", "passes"), [(1, 4), (5, 3)])
def test_before_each_pass(tokens: int, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def before() -> None:
        nonlocal clock
        clock += 1.0

    monkeypatch.setattr(models, "perf_counter", lambda: clock)
    seconds = measure_model(random_model(1, 32), tokens, 3, before=before)
    assert seconds == [0.0] * 3
    assert clock == passes, "the first pass of one token has it too, and does not count"
