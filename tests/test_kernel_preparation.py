"""Kernels are at hand when a model is: neither decoding nor a prompt waits for a compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from cpu_kernels import (
    decode_attention_kernel,
    expert_mlp,
    expert_mlp_kernel,
    linear,
    linear_kernel,
    packed_kernel,
    packed_linear,
    paged_attention_block,
    paged_attention_kernel,
    panel_kernel,
    panel_mlp,
    rms_norm_kernel,
    rotary_kernel,
    tape_experts_kernel,
    tape_kernel,
)
from offload import kernel_preparation
from tests.conftest import TinyCheckpoint

MODULES = (
    decode_attention_kernel, expert_mlp, expert_mlp_kernel, linear, linear_kernel, packed_kernel, packed_linear,
    paged_attention_block, paged_attention_kernel, panel_kernel, panel_mlp, rms_norm_kernel, rotary_kernel,
    tape_experts_kernel, tape_kernel,
)  # fmt: skip


def made_tasks() -> int:
    """How many compiled tasks this process has asked for so far."""
    caches = {id(value): value for module in MODULES for value in vars(module).values() if hasattr(value, "cache_info")}
    return sum(cached.cache_info().misses for cached in caches.values())


class Told:
    def __init__(self) -> None:
        self.events: list[str] = []

    def start(self, total_bytes: int, description: str) -> None:
        self.events.append(description)

    def advance(self, nbytes: int) -> None:
        raise AssertionError("the amount of work is not known")

    def finish(self) -> None:
        self.events.append("finished")


@pytest.mark.parametrize("quant", [None, "int4"])
def test_nothing_is_compiled_after_loading(
    tiny_checkpoint: TinyCheckpoint, store_root: Path, quant: str | None
) -> None:
    model = offload.load(tiny_checkpoint("qwen3_moe"), ram="1GiB", nvme=store_root, context=80, quant=quant)
    before = made_tasks()
    ids = torch.arange(40)[None] % 90
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert made_tasks() == before
    model.offload.close()


def test_progress_ends_also_when_a_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_layer: Any) -> None:
        raise ValueError("no kernel")

    layer = type("Layer", (), {"layout": "one", "dtype": torch.float32})()
    told = Told()
    monkeypatch.setattr(kernel_preparation, "compile_for", fail)
    with pytest.raises(ValueError, match="no kernel"):
        kernel_preparation.prepare_kernels(torch.nn.Module(), [layer], told)  # type: ignore[arg-type]
    assert told.events == ["Preparing kernels: compiled the first time, then kept", "finished"]
