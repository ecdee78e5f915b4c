"""Traces as bytes; see docs/traces.md for the format. Reading and writing files is the caller's."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from prefetch.policies.geometry import Geometry
from prefetch.traces.trace import RoutingTrace, TraceError

MAGIC = b"MOETRACE"
VERSION = 2
_READ_VERSIONS = (1, 2)

_PREFIX = struct.Struct("<8sHHII")
"""Magic, version, zero, bytes of the header, CRC-32 of all that follows the prefix."""

_LARGEST_NBYTES = 1 << 36


def encode(trace: RoutingTrace) -> bytes:
    """The trace in the current version of the format."""
    header = {
        "name": trace.name,
        "counts": trace.geometry.counts,
        "top_k": trace.top_k,
        "passes": trace.passes,
        "tokens": len(trace.experts),
        "scores": trace.scores is not None,
        "depth": trace.depth,
    }
    text = json.dumps(header).encode()
    narrow = max(trace.geometry.counts) <= 256
    arrays: list[npt.NDArray[Any]] = [
        trace.pass_tokens.astype("<i4"),
        trace.pass_prefill.astype("u1"),
        # Layer by layer: neighbours are alike, and compress.
        np.ascontiguousarray(trace.experts.transpose(1, 2, 0)).astype("u1" if narrow else "<u2"),
    ]
    if trace.scores is not None:
        arrays.append(trace.scores.astype("<f2"))
    if trace.ahead is not None:
        arrays.append(trace.ahead.astype("<f2"))
    body = text + zlib.compress(b"".join(array.tobytes() for array in arrays), 6)
    return _PREFIX.pack(MAGIC, VERSION, 0, len(text), zlib.crc32(body)) + body


def decode(data: bytes) -> RoutingTrace:
    """The trace that `encode` wrote.

    Raises:
        TraceError: not a trace, of another version, cut off or damaged.
    """
    if len(data) < _PREFIX.size or data[:8] != MAGIC:
        raise TraceError(f"not a routing trace: expected {MAGIC!r} at the start, found {data[:8]!r}")
    _, version, _, header_nbytes, checksum = _PREFIX.unpack_from(data)
    if version not in _READ_VERSIONS:
        raise TraceError(f"a routing trace of version {version}; this reads versions up to {VERSION}")
    body = data[_PREFIX.size :]
    if len(body) < header_nbytes or zlib.crc32(body) != checksum:
        raise TraceError("a routing trace that is cut off or damaged: its checksum is wrong; record it again")
    try:
        header = json.loads(body[:header_nbytes])
        geometry = Geometry(tuple(int(count) for count in header["counts"]))
        passes, tokens, top_k = (int(header[name]) for name in ("passes", "tokens", "top_k"))
        depth = int(header["depth"]) if version > 1 else 0
        scores = bool(header["scores"])
        widths = _widths(geometry, passes, tokens, top_k, depth, scores=scores)
        raw = _inflate(body[header_nbytes:], sum(nbytes for _, _, nbytes in widths))
        arrays, start = [], 0
        for dtype, shape, nbytes in widths:
            arrays.append(np.frombuffer(raw[start : start + nbytes], dtype).reshape(shape))
            start += nbytes
        name = str(header["name"])
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise TraceError(f"a routing trace whose header does not fit its content: {error}") from error
    return RoutingTrace(
        name,
        geometry,
        top_k,
        arrays[0].astype(np.int32),
        arrays[1].astype(np.bool_),
        np.ascontiguousarray(arrays[2].transpose(2, 0, 1)).astype(np.uint16),
        arrays[3].astype(np.float16) if scores else None,
        arrays[-1].astype(np.float16) if depth else None,
    )


def _widths(
    geometry: Geometry, passes: int, tokens: int, top_k: int, depth: int, *, scores: bool
) -> list[tuple[str, tuple[int, ...], int]]:
    """(dtype, shape, bytes) of each array."""
    layers, widest = geometry.layers, max(geometry.counts)
    found: list[tuple[str, tuple[int, ...]]] = [
        ("<i4", (passes,)),
        ("u1", (passes,)),
        ("u1" if widest <= 256 else "<u2", (layers, top_k, tokens)),
    ]
    if scores:
        found.append(("<f2", (passes, layers, widest)))
    if depth:
        found.append(("<f2", (passes, layers, depth, widest)))
    sized = [(dtype, shape, int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize) for dtype, shape in found]
    if any(nbytes < 0 for *_, nbytes in sized) or sum(nbytes for *_, nbytes in sized) > _LARGEST_NBYTES:
        raise ValueError(f"{tokens} tokens in {passes} passes")
    return sized


def _inflate(data: bytes, nbytes: int) -> bytes:
    engine = zlib.decompressobj()
    raw = engine.decompress(data, nbytes + 1)
    if len(raw) != nbytes or not engine.eof:
        raise ValueError(f"{len(raw)} bytes of arrays, expected {nbytes}")
    return raw
