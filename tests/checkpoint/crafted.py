"""Safetensors files written by hand, sound or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_raw(path: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    """A file with exactly this header, and a length field that may lie about it."""
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    prefix = (len(header) if length is None else length).to_bytes(8, "little")
    path.write_bytes(prefix + header + data)
    return path


def entry(begin: int, end: int, dtype: str = "U8", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def write_shards(directory: Path, shards: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """Shards and their index; returns the weight map that the index holds."""
    weight_map = {}
    for name, tensors in shards.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / name)
        weight_map.update(dict.fromkeys(tensors, name))
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: Any) -> None:
    content = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(content)


def two_shards(directory: Path) -> dict[str, str]:
    return write_shards(
        directory,
        {
            "model-00001-of-00002.safetensors": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5)},
            "model-00002-of-00002.safetensors": {"c": torch.ones(3, dtype=torch.bfloat16)},
        },
    )
