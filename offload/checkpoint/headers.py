"""The header of a safetensors file, parsed and checked without trusting a byte of it.

A file is: length n of the header, 8 bytes little endian | header, n bytes of JSON | data. The JSON maps a tensor's
name to its dtype, its shape and the range [begin, end) of its bytes in the data; the ranges cover the data exactly.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from offload.checkpoint.dtypes import DTYPE_BITS
from offload.checkpoint.files import FileIdentity, open_regular, read_exactly
from offload.checkpoint.mismatch import mismatch
from offload.errors import CheckpointError
from placement.tensors import TensorSpan

LENGTH_BYTES = 8
MAXIMUM_HEADER_BYTES = 100_000_000
MAXIMUM_ELEMENTS = 2**63 - 1


@dataclass(frozen=True)
class FileHeader:
    """What one file says it holds.

    Attributes:
        path: the file, absolute.
        tensors: by name; offsets count from the file's start.
        digest: hex digest of the header's bytes.
        identity: of the file when the header was read.
    """

    path: str
    tensors: dict[str, TensorSpan]
    digest: str
    identity: FileIdentity


def read_header(path: str | os.PathLike[str]) -> FileHeader:
    """Read and check a file's header.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: not a regular file, or the header is not sound, or does not match the file's size.
    """
    # Not resolved: the name that the user knows belongs into messages, and a Hub blob's name says nothing.
    path = os.path.abspath(path)  # noqa: PTH100
    descriptor, identity = open_regular(path)
    try:
        header = _read_header_bytes(descriptor, identity.size, path)
    finally:
        os.close(descriptor)
    data_start = LENGTH_BYTES + len(header)
    entries = _parse(header, path)
    tensors = {name: checked_span(name, entry, data_start, path) for name, entry in entries.items()}
    _check_cover(tensors, data_start, identity.size, path)
    return FileHeader(path, tensors, hashlib.blake2b(header, digest_size=16).hexdigest(), identity)


def _read_header_bytes(descriptor: int, size: int, path: str) -> bytes:
    if size < LENGTH_BYTES:
        raise mismatch(path, expected="a safetensors file of at least 8 bytes", found=f"{size} bytes")
    prefix = bytearray(LENGTH_BYTES)
    read_exactly(descriptor, memoryview(prefix), 0, path)
    length = int.from_bytes(prefix, "little")
    limit = min(MAXIMUM_HEADER_BYTES, size - LENGTH_BYTES)
    if not 2 <= length <= limit:
        raise mismatch(path, expected=f"a header of 2 to {limit} bytes", found=f"a header length of {length}")
    header = bytearray(length)
    read_exactly(descriptor, memoryview(header), LENGTH_BYTES, path)
    return bytes(header)


def parse_json_object(content: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parse UTF-8 JSON whose top is an object; a key that occurs twice in one object is an error.

    Raises:
        CheckpointError: anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise mismatch(path, tensor=twice, expected="every key once", found="the key twice")
        return result

    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise mismatch(path, expected="UTF-8 JSON", found=f"{error}") from error
    if not isinstance(parsed, dict):
        raise mismatch(path, expected="a JSON object", found=f"a JSON {type(parsed).__name__}")
    return parsed


def _parse(header: bytes, path: str) -> dict[str, Any]:
    entries = parse_json_object(header, path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise mismatch(path, tensor="__metadata__", expected="an object of strings", found=f"{metadata!r:.80}")
    return entries


def checked_span(name: str, entry: Any, data_start: int, path: str) -> TensorSpan:
    """One entry of a header.

    Raises:
        CheckpointError: an unknown dtype, a shape that is none, or a range of other bytes than these have.
    """

    def wrong(expected: str, found: object) -> CheckpointError:
        return mismatch(path, tensor=name, expected=expected, found=f"{found!r:.120}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong("an object with dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise wrong(f"a dtype out of {', '.join(DTYPE_BITS)}", dtype)
    if not _are_sizes(shape):
        raise wrong("a shape of non-negative integers", shape)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong("data_offsets [begin, end] with begin <= end", offsets)
    bits = _elements(shape) * DTYPE_BITS[dtype]
    if _elements(shape) > MAXIMUM_ELEMENTS or bits // 8 > MAXIMUM_ELEMENTS:
        raise wrong("a tensor of less than 2^63 bytes", shape)
    begin, end = offsets
    if bits % 8 or bits // 8 != end - begin:
        raise wrong(f"{bits / 8:g} bytes for {dtype} {shape}", offsets)
    return TensorSpan(path, data_start + begin, end - begin, dtype, tuple(shape))


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _elements(shape: list[int]) -> int:
    elements = 1
    for size in shape:
        elements *= size
        # A shape can name more dimensions than the product's digits could ever be multiplied in.
        if elements > MAXIMUM_ELEMENTS:
            return MAXIMUM_ELEMENTS + 1
    return elements


def _check_cover(tensors: dict[str, TensorSpan], data_start: int, size: int, path: str) -> None:
    end = data_start
    for name, span in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if span.offset != end:
            what = "an overlap" if span.offset < end else "a hole"
            raise mismatch(
                path,
                tensor=name,
                expected=f"data from {end - data_start} on",
                found=f"data from {span.offset - data_start} on ({what})",
            )
        end += span.nbytes
    if end != size:
        what = "truncated" if size < end else "bytes that belong to no tensor"
        raise mismatch(path, expected=f"a file of {end} bytes", found=f"{size} bytes ({what})")
