"""Which files a checkpoint is made of: one `model.safetensors`, or the shards that an index lists."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from offload.checkpoint.files import read_small
from offload.checkpoint.headers import FileHeader, parse_json_object, read_header
from offload.checkpoint.mismatch import mismatch
from offload.errors import CheckpointNotFoundError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAXIMUM_INDEX_BYTES = 1 << 28


def read_files(directory: Path) -> dict[str, FileHeader]:
    """The headers of a checkpoint's files, by file name relative to the directory, sorted.

    A single file takes precedence over an index, as in transformers. Files that the index does not list are ignored.

    Raises:
        CheckpointNotFoundError: neither is there, or a listed shard is missing.
        CheckpointError: the index or a header is not sound, or they do not agree on what each file holds.
    """
    if os.path.lexists(directory / SINGLE_FILE):
        return {SINGLE_FILE: read_header(directory / SINGLE_FILE)}
    index_path = directory / INDEX_FILE
    if not os.path.lexists(index_path):
        raise CheckpointNotFoundError(
            f"{directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither. Fix: finish the download, or pass "
            "the directory that holds the model."
        )
    weight_map = read_weight_map(index_path)
    headers = {name: read_header(directory / name) for name in sorted(set(weight_map.values()))}
    _check_agreement(index_path, weight_map, headers)
    return headers


def read_weight_map(index_path: Path) -> dict[str, str]:
    """The file of every tensor, by key; names are plain and relative.

    Raises:
        CheckpointError: not such an index.
    """
    index = parse_json_object(read_small(index_path, MAXIMUM_INDEX_BYTES), index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise mismatch(index_path, expected="a weight_map of tensor names to files", found=f"{weight_map!r:.80}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise mismatch(
                index_path,
                tensor=tensor,
                expected="the relative name of a file below the checkpoint's directory",
                found=f"{name!r:.200}",
                fix="do not use this checkpoint: its index points out of its directory",
            )
    return weight_map


def _is_plain(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    parts = name.split("/")
    return (
        "\0" not in name
        and not PurePosixPath(name).is_absolute()
        and all(part not in ("", ".", "..") for part in parts)
    )


def _check_agreement(index_path: Path, weight_map: Mapping[str, str], headers: Mapping[str, FileHeader]) -> None:
    for tensor, name in weight_map.items():
        if tensor not in headers[name].tensors:
            raise mismatch(
                headers[name].path,
                tensor=tensor,
                expected=f"the tensor, which {index_path.name} says is here",
                found="a file without it",
            )
    for name, header in headers.items():
        for tensor in header.tensors:
            if weight_map.get(tensor) != name:
                listed = weight_map.get(tensor)
                raise mismatch(
                    header.path,
                    tensor=tensor,
                    expected=f"only tensors that {index_path.name} lists for this file",
                    found="one that it does not list" if listed is None else f"one that it lists for {listed!r}",
                )
