r"""The record of what a store holds: written last, so that a store with a manifest is a whole one.

    {"checksum":"<xxh3_64 of the body, 16 hex digits>","manifest":<body>}\n

The body is JSON without line breaks. The checksum is over its bytes as they stand in the file, so a flipped bit is
found before anything is parsed.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import xxhash

from formats.bundle import BUNDLE_ALIGNMENT_BYTES, BundleLayout
from offload.store.names import is_shard_file
from offload.store.source import ExpertGroup

MANIFEST_VERSION = 1

_HEAD, _MIDDLE, _TAIL = b'{"checksum":"', b'","manifest":', b"}\n"
_CHECKSUM = re.compile(r"[0-9a-f]{16}")
_BODY_START = len(_HEAD) + 16 + len(_MIDDLE)


class ManifestError(ValueError):
    """The bytes are not a manifest; the message says what is wrong, without the file's name."""


class ShardFile(NamedTuple):
    """A shard: its file name in the store's directory, and its size in bytes."""

    file: str
    nbytes: int


class BundleRecord(NamedTuple):
    """A bundle: index of its shard, offset in bytes from the start of the file, xxh3_64 of its bytes."""

    shard: int
    offset: int
    checksum: int


@dataclass(frozen=True)
class Manifest:
    """What a store holds. Every bundle lies inside its shard, aligned, and no two overlap.

    Attributes:
        identity: the source's identity, in full.
        name: what the user called the model.
        format: name of the element format.
        created_unix: when it was written, in seconds since 1970.
        shards: the files.
        groups: the MoE layers.
        bundles: per group, per expert.
    """

    identity: str
    name: str
    format: str
    created_unix: int
    shards: tuple[ShardFile, ...]
    groups: tuple[ExpertGroup, ...]
    bundles: tuple[tuple[BundleRecord, ...], ...]


def shard_metadata(identity: str, name: str, element_format: str) -> dict[str, str]:
    """The `__metadata__` of every shard of a store."""
    return {
        "writer": "moe-offload",
        "version": str(MANIFEST_VERSION),
        "source_identity": identity,
        "source_name": name,
        "element_format": element_format,
    }


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as the bytes of its file."""
    body = {
        "version": MANIFEST_VERSION,
        "identity": manifest.identity,
        "name": manifest.name,
        "format": manifest.format,
        "created_unix": manifest.created_unix,
        "shards": [shard._asdict() for shard in manifest.shards],
        "groups": [
            {
                "module": group.module,
                "count": group.count,
                "layout": asdict(group.layout),
                "bundle_nbytes": group.layout.nbytes,
                "bundles": [[record.shard, record.offset, f"{record.checksum:016x}"] for record in records],
            }
            for group, records in zip(manifest.groups, manifest.bundles, strict=True)
        ],
    }
    text = json.dumps(body, separators=(",", ":")).encode("ascii")
    return _HEAD + xxhash.xxh3_64_hexdigest(text).encode("ascii") + _MIDDLE + text + _TAIL


def decode_manifest(raw: bytes) -> Manifest:
    """Read and validate a manifest.

    Raises:
        ManifestError: any byte is not as it was written, or what was written breaks the record's invariants.
    """
    checksum, body = raw[len(_HEAD) : len(_HEAD) + 16], raw[_BODY_START : -len(_TAIL)]
    framed = raw == _HEAD + checksum + _MIDDLE + body + _TAIL
    if not framed or xxhash.xxh3_64_hexdigest(body).encode("ascii") != checksum:
        raise ManifestError("its bytes do not match its checksum")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"it is not JSON ({error})") from error
    version = _get(fields, "version", int)
    if version != MANIFEST_VERSION:
        raise ManifestError(
            f"it has format version {version}, and this version of moe-offload reads {MANIFEST_VERSION}"
        )
    shards = tuple(_shard(entry) for entry in _get(fields, "shards", list))
    groups, bundles = [], []
    for entry in _get(fields, "groups", list):
        groups.append(_group(entry))
        bundles.append(tuple(_record(record) for record in _get(entry, "bundles", list)))
    manifest = Manifest(
        identity=_get(fields, "identity", str),
        name=_get(fields, "name", str),
        format=_get(fields, "format", str),
        created_unix=_get(fields, "created_unix", int),
        shards=shards,
        groups=tuple(groups),
        bundles=tuple(bundles),
    )
    _check_locations(manifest)
    return manifest


def _get(fields: object, name: str, kind: type) -> Any:
    value = fields.get(name) if isinstance(fields, dict) else None
    if type(value) is not kind:  # bool is an int to isinstance
        raise ManifestError(f'"{name}" is not a {kind.__name__}')
    return value


def _shard(entry: object) -> ShardFile:
    shard = ShardFile(_get(entry, "file", str), _get(entry, "nbytes", int))
    if not is_shard_file(shard.file):
        raise ManifestError(f"{shard.file!r} is not the name of a shard")
    return shard


def _group(entry: object) -> ExpertGroup:
    bundle_nbytes = _get(entry, "bundle_nbytes", int)
    try:
        layout = BundleLayout(**_get(entry, "layout", dict))
        nbytes = layout.nbytes
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ManifestError(f"a layout is not one that this version of moe-offload knows ({error})") from error
    if bundle_nbytes != nbytes:
        raise ManifestError(f"a bundle of {layout} has {nbytes} bytes, and it says {bundle_nbytes}")
    return ExpertGroup(_get(entry, "module", str), _get(entry, "count", int), layout)


def _record(entry: object) -> BundleRecord:
    if not (isinstance(entry, list) and [type(value) for value in entry] == [int, int, str]):
        raise ManifestError("a bundle is not [shard, offset, checksum]")
    shard, offset, checksum = entry
    if not _CHECKSUM.fullmatch(checksum):
        raise ManifestError(f"{checksum!r} is not a checksum")
    return BundleRecord(shard, offset, int(checksum, 16))


def _check_locations(manifest: Manifest) -> None:
    """The invariants that span fields: counts, names, and that bundles lie inside their shards, aligned and apart."""
    if len({shard.file for shard in manifest.shards}) < len(manifest.shards):
        raise ManifestError("two shards have the same name")
    if not manifest.groups or any(group.layout.format != manifest.format for group in manifest.groups):
        raise ManifestError(f"its experts are not of the format {manifest.format!r}")
    used: list[list[tuple[int, int]]] = [[] for _ in manifest.shards]
    for group, records in zip(manifest.groups, manifest.bundles, strict=True):
        if group.count < 1 or len(records) != group.count:
            raise ManifestError(f"{group.module} has {len(records)} bundles for {group.count} experts")
        for record in records:
            if not 0 <= record.shard < len(used):
                raise ManifestError(f"{group.module} names shard {record.shard} of {len(used)}")
            used[record.shard].append((record.offset, record.offset + group.layout.nbytes))
    for shard, spans in zip(manifest.shards, used, strict=True):
        # The header takes at least one block.
        end = BUNDLE_ALIGNMENT_BYTES
        for start, stop in sorted(spans):
            if start % BUNDLE_ALIGNMENT_BYTES or start < end or stop > shard.nbytes:
                raise ManifestError(
                    f"a bundle at {start}:{stop} of {shard.file} is unaligned, overlaps or lies outside"
                )
            end = stop
