"""The trained tiny model with larger experts: its routing, with reads that matter."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.checkpoints import written_once
from benchmarks.trace_recording import MODEL


def ensure_widened(work: Path, times: int) -> Path:
    """The checkpoint of the tiny model with experts `times` as wide, under `work`; written unless it is there.

    Gate and up projections are repeated, the down projection is repeated and divided by `times`. For a power of two
    each expert computes what it did, up to rounding, so the router chooses as it was trained to.

    Args:
        work: directory of checkpoints.
        times: a power of two.
    """
    if times < 1 or times & (times - 1):
        raise ValueError(f"times={times}: expected a power of two, by which bf16 divides without rounding")
    return written_once(work, f"tiny-moe-x{times}", partial(_write, times))


def _write(times: int, directory: Path) -> None:
    shutil.copytree(MODEL, directory)
    config = json.loads((MODEL / "config.json").read_text())
    config["moe_intermediate_size"] *= times
    (directory / "config.json").write_text(json.dumps(config))
    weights = load_file(MODEL / "model.safetensors")
    save_file(
        {name: _widened(name, weight, times) for name, weight in weights.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )


def _widened(name: str, weight: torch.Tensor, times: int) -> torch.Tensor:
    if ".experts." not in name:
        return weight
    if "down_proj" in name:
        return (weight / times).repeat(1, times)
    return weight.repeat(times, 1)
