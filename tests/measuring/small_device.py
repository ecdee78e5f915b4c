"""Sizes at which an accelerator is measured in Triton's interpreter within seconds."""

from __future__ import annotations

from typing import Any

import pytest

from offload.measuring import calibration, device_copies, device_kernels, kernels, models
from profiler import accelerator, points
from profiler.effort import Effort
from profiler.rounds import AttentionPoint

EFFORT = Effort((1, 2), 0.0, (), (), 0.0, 1 << 20, ("bf16", "int4"), packed_passes=False, rounds=1)

_SIZES: dict[Any, dict[str, Any]] = {
    kernels: {"HIDDEN": 128, "INTERMEDIATE": 64, "NARROW_HIDDEN": 64, "NARROW_INTERMEDIATE": 32},
    device_kernels: {"COLD_NBYTES": 1 << 20, "_STREAM_NBYTES": 1 << 20, "experts_of_call": lambda _tokens: 2},
    device_copies: {"MEMORY_NBYTES": 1 << 20, "_PIECE_NBYTES": 1 << 18},
    accelerator: {
        "_LARGE_ROWS": 64,
        "_SMALL_ROWS": 16,
        "_SIZES": (4096, 64 << 10),
        "_BESIDE_COPIES": 2,
        "experts_of_call": lambda _tokens: 2,
        "_ATTENTION": tuple(
            AttentionPoint(f"attention, {new} new, {cached} cached", new, cached)
            for new, cached in ((1, 4), (1, 64), (4, 0), (32, 0))
        ),
    },
    points: {"_NARROW_TOKENS": 2, "_NARROW_UNPACKED_TOKENS": 2, "NARROW_COUNT": 2},
    calibration: {"SHORT_TOKENS": 4, "PROMPT_TOKENS": 8},
}

_MODEL = {
    "vocab_size": 64,
    "hidden_size": 128,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make everything small."""
    for module, sizes in _SIZES.items():
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
    sizes = models.SIZES | _MODEL
    monkeypatch.setattr(models, "SIZES", sizes)
    monkeypatch.setattr(calibration, "SIZES", sizes)
