"""Kernels are at hand when a model is: neither decoding nor a prompt waits for a compiler."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpu_kernels.compiling.together import Kernel, prepare_named
from offload import kernel_preparation
from tests.conftest import TinyCheckpoint

_IN_A_NEW_PROCESS = """
import sys, torch, offload
from cpu_kernels.compiling.kept import KeptFunctions

asked, look_up = [], KeptFunctions.load_overload

def look_up_and_tell(self, signature, target):
    asked.append(self._name)
    return look_up(self, signature, target)

KeptFunctions.load_overload = look_up_and_tell
checkpoint, store = sys.argv[1:]
for quant in (None, "int4"):
    model = offload.load(checkpoint, ram="1GiB", nvme=store, context=80, quant=quant)
    assert asked
    asked.clear()
    model.generate(torch.arange(40)[None] % 90, max_new_tokens=3, do_sample=False)
    assert not asked, f"{quant}: {asked}"
    model.offload.close()
"""
"""Alone, because what other tests compiled is there already."""


class Told:
    def __init__(self) -> None:
        self.events: list[str] = []

    def start(self, total_bytes: int, description: str) -> None:
        self.events.append(description)

    def advance(self, nbytes: int) -> None:
        raise AssertionError("the amount of work is not known")

    def finish(self) -> None:
        self.events.append("finished")


def test_nothing_is_compiled_after_loading(tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    arguments = [str(tiny_checkpoint("qwen3_moe")), str(store_root)]
    done = subprocess.run(
        [sys.executable, "-c", _IN_A_NEW_PROCESS, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_progress_ends_also_when_a_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(kernels: Sequence[Kernel], *, processes: int) -> None:
        assert (prepare_named, ("prefetch.policies.selection_kernel", "select")) in kernels
        assert processes == 1
        raise ValueError("no kernel")

    layer: Any = SimpleNamespace(layout=SimpleNamespace(format="fp32"))
    model: Any = SimpleNamespace(dtype=torch.float32, modules=list)
    told = Told()
    monkeypatch.setattr(kernel_preparation, "compile_together", fail)
    with pytest.raises(ValueError, match="no kernel"):
        kernel_preparation.compile_ahead(model, [layer], told, fused=(), with_policy=True, spare_ram_nbytes=1 << 20)
    assert told.events == ["Preparing kernels: compiled the first time, then kept", "finished"]
