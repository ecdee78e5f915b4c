"""Kernels are at hand when a model is: neither decoding nor a prompt waits for a compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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
    def fail(_layer: Any) -> None:
        raise ValueError("no kernel")

    layer = type("Layer", (), {"layout": "one", "dtype": torch.float32})()
    told = Told()
    monkeypatch.setattr(kernel_preparation, "compile_for", fail)
    with pytest.raises(ValueError, match="no kernel"):
        kernel_preparation.prepare_kernels(torch.nn.Module(), [layer], told)  # type: ignore[arg-type]
    assert told.events == ["Preparing kernels: compiled the first time, then kept", "finished"]
