"""What the files and directories under a root are called.

A store is `<model>-<key>`, its lock `.<key>.lock`, what is being written or removed `.<key>.partial`, and what was
learnt while its model ran `.<key>.learnt.npz`. The key, `<16 hex digits of the identity>-<format>`, leaves the model's
name out: one model under two names has one lock.
"""

from __future__ import annotations

import re

from offload.errors import InvalidArgumentError

MANIFEST_FILE = "manifest.json"
MANIFEST_TEMPORARY_FILE = "manifest.json.tmp"
MARKER_FILE = "partial.json"

_KEY = r"(?P<key>[0-9a-f]{16}-[a-z0-9_]+)"
_STORE = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]*-{_KEY}")
_PARTIAL = re.compile(rf"\.{_KEY}\.partial")
_SHARD = re.compile(r"experts-[0-9]{5,}-of-[0-9]{5,}\.safetensors")
_IDENTITY = re.compile(r"[0-9a-f]{16,}")
_MODEL_NAME_CHARACTERS = 80


def store_key(identity: str, element_format: str) -> str:
    """The key of a model in an element format.

    Raises:
        InvalidArgumentError: the identity is not at least 16 lower-case hex digits.
    """
    if not _IDENTITY.fullmatch(identity):
        raise InvalidArgumentError(f"identity {identity!r}: expected a digest of at least 16 lower-case hex digits")
    return f"{identity[:16]}-{re.sub('[^a-z0-9_]+', '_', element_format.lower())}"


def store_directory(name: str, key: str) -> str:
    """The directory of a store; of a path or Hub id, the last two parts are kept for people to read."""
    model = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(name.rstrip("/").split("/")[-2:]))
    return f"{model.strip('.-')[:_MODEL_NAME_CHARACTERS] or 'model'}-{key}"


def lock_file(key: str) -> str:
    """The lock of a key."""
    return f".{key}.lock"


def learnt_file(key: str) -> str:
    """Where what was learnt of a model while it ran is kept; not part of the store."""
    return f".{key}.learnt.npz"


def partial_directory(key: str) -> str:
    """Where a store of this key is written and removed."""
    return f".{key}.partial"


def shard_file(index: int, count: int) -> str:
    """The name of a shard, counted from 1 as checkpoints do."""
    return f"experts-{index + 1:05d}-of-{count:05d}.safetensors"


def is_shard_file(name: str) -> bool:
    """Whether it is a shard's name: without a directory, so it cannot lead out of the store."""
    return _SHARD.fullmatch(name) is not None


def is_own_file(name: str) -> bool:
    """Whether a file of this name is one that a store or a partial store holds."""
    return name in (MANIFEST_FILE, MANIFEST_TEMPORARY_FILE, MARKER_FILE) or is_shard_file(name)


def key_of_store(directory_name: str) -> str | None:
    """The key in a store's directory name; None where it is not one."""
    match = _STORE.fullmatch(directory_name)
    return match["key"] if match else None


def key_of_partial(directory_name: str) -> str | None:
    """The key in a partial directory's name; None where it is not one."""
    match = _PARTIAL.fullmatch(directory_name)
    return match["key"] if match else None
