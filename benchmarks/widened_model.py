"""The trained tiny model with larger experts: its routing, with reads that matter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness import say
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
    directory = work / "checkpoints" / f"tiny-moe-x{times}"
    if directory.exists():
        return directory
    say(f"writing the checkpoint {directory.name}")
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(MODEL, unfinished)
    config = json.loads((MODEL / "config.json").read_text())
    config["moe_intermediate_size"] *= times
    (unfinished / "config.json").write_text(json.dumps(config))
    weights = load_file(MODEL / "model.safetensors")
    save_file(
        {name: _widened(name, weight, times) for name, weight in weights.items()},
        unfinished / "model.safetensors",
        {"format": "pt"},
    )
    unfinished.rename(directory)
    return directory


def _widened(name: str, weight: torch.Tensor, times: int) -> torch.Tensor:
    if ".experts." not in name:
        return weight
    if "down_proj" in name:
        return (weight / times).repeat(1, times)
    return weight.repeat(times, 1)
