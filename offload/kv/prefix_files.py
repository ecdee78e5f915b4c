"""Saved KV prefixes on disk: one file each, found by what it holds, never half there.

A file is a header, the prefix's tokens and its blocks, each from a multiple of 4 KiB on. The name carries a hash of the
model's identity and of the tokens; the header repeats both, and every part has a checksum. A file is written beside its
place, made durable and renamed, by one writer at a time. What a killed writer leaves has no name that a reader looks
for, and the next writer removes it. Files that were used longest ago go where a new one needs their room.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from formats.bundle import BUNDLE_ALIGNMENT_BYTES
from formats.packed import round_up
from offload.errors import DoesNotFitError, StoreCorruptError
from offload.store import files
from offload.store.locks import store_lock

Bytes = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]

VERSION = 2
_MAGIC = b"KVPREFIX"
_SUFFIX, _UNFINISHED = ".kvprefix", ".unfinished"
_LOCK_KEY = "prefixes"
_PREAMBLE_NBYTES = 24  # magic, length of the header, its checksum


@dataclass(frozen=True)
class SavedPrefix:
    """An opened file whose header and tokens are sound.

    Attributes:
        tokens: how many it holds.
        description: what was saved with it.
        blocks: their bytes in order; each is checked when it is read.
    """

    tokens: int
    description: dict[str, Any]
    blocks: Iterator[Bytes]


@dataclass
class PrefixStatistics:
    """What saved prefixes did.

    Attributes:
        saved: prefixes that were written, or were there already.
        reused: calls that began with one.
        reused_tokens: tokens that were not computed for it.
        rejected: files that were damaged or foreign, and removed.
    """

    saved: int = 0
    reused: int = 0
    reused_tokens: int = 0
    rejected: int = 0


class PrefixFiles:
    """The prefixes of one model in a directory that models may share.

    Attributes:
        directory: where the files are.
        budget_nbytes: bound on the bytes of all prefixes in it.
        identity: what a prefix depends on besides its tokens.
    """

    def __init__(self, directory: Path, budget_nbytes: int, identity: str) -> None:
        """Nothing is written yet."""
        self.directory = directory
        self.budget_nbytes = budget_nbytes
        self.identity = identity
        self._model = hashlib.sha256(identity.encode()).hexdigest()[:16]

    def longest(self, tokens: Int64) -> int:
        """How many of the first tokens the longest saved prefix has that all of its tokens agree with; 0: none."""
        for count in self._counts():
            if count <= len(tokens) and self._path(tokens[:count]).exists():
                return count
        return 0

    def _counts(self) -> list[int]:
        """Lengths of this model's prefixes, the longest first."""
        found = set()
        for path in self.directory.glob(f"{self._model}-*{_SUFFIX}"):
            words = path.stem.split("-")
            if len(words) == 3 and words[1].isdecimal():
                found.add(int(words[1]))
        return sorted(found, reverse=True)

    def _path(self, tokens: Int64) -> Path:
        digest = hashlib.sha256(np.ascontiguousarray(tokens, np.int64).tobytes()).hexdigest()[:32]
        return self.directory / f"{self._model}-{len(tokens)}-{digest}{_SUFFIX}"

    def save(self, tokens: Int64, description: dict[str, Any], sizes: list[int], blocks: Iterable[Bytes]) -> Path:
        """Write a prefix, unless it is there; others go if they must.

        Args:
            tokens: int64, of the prefix.
            description: what is needed to use it; JSON.
            sizes: bytes of each block, multiples of 4 KiB.
            blocks: uint8, of these sizes; not kept.

        Raises:
            DoesNotFitError: it is larger than the budget.
            StorageError: writing failed; nothing is left.
        """
        path = self._path(tokens)
        nbytes = sum(sizes) + round_up(8 * len(tokens), BUNDLE_ALIGNMENT_BYTES) + (64 * len(sizes) + (1 << 16))
        if nbytes > self.budget_nbytes:
            raise DoesNotFitError(
                f"a prefix of {len(tokens)} tokens takes {nbytes:,} bytes, prefix_cache allows {self.budget_nbytes:,}; "
                "give prefix_cache= more"
            )
        with files.storage_errors("writing", path):
            self.directory.mkdir(parents=True, exist_ok=True)
            with store_lock(self.directory, _LOCK_KEY, timeout_seconds=None):
                if not path.exists():
                    self._make_room(nbytes)
                    self._write(path, tokens, description, sizes, blocks)
        return path

    def _make_room(self, nbytes: int) -> None:
        """Remove what killed writers left, and the prefixes used longest ago. The caller holds the lock."""
        for path in self.directory.glob(f"*{_UNFINISHED}"):
            files.unlink(path)
        used = []
        for path in self.directory.glob(f"*{_SUFFIX}"):
            with suppress(FileNotFoundError):
                status = path.stat()
                used.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in used)
        for _, size, path in sorted(used):
            if total + nbytes <= self.budget_nbytes:
                return
            files.unlink(path)
            total -= size

    def _write(
        self, path: Path, tokens: Int64, description: dict[str, Any], sizes: list[int], blocks: Iterable[Bytes]
    ) -> None:
        unfinished = path.with_name(f"{uuid.uuid4().hex}{_UNFINISHED}")
        lying = _padded(np.ascontiguousarray(tokens, np.int64).view(np.uint8))
        fd = files.open_file(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            # Checksums are known last, so the header's room is measured with the longest that there can be.
            header = _header(self.identity, tokens, description, sizes, [2**64 - 1] * len(sizes))
            place = start = len(header)
            files.write_all(fd, lying, place)
            place += lying.nbytes
            checksums = []
            for block, size in zip(blocks, sizes, strict=True):
                if block.dtype != np.uint8 or block.shape != (size,):
                    raise ValueError(f"block: expected uint8 [{size}], found {block.dtype} {block.shape}")
                checksums.append(xxhash.xxh3_64_intdigest(block.data))
                files.write_all(fd, block, place)
                place += size
            header = _header(self.identity, tokens, description, sizes, checksums)
            files.write_all(fd, _padded(np.frombuffer(header, np.uint8), start), 0)
            files.fsync(fd)
            files.drop_cache(fd)
        except BaseException:
            with suppress(OSError):
                files.unlink(unfinished)
            raise
        finally:
            os.close(fd)
        files.rename(unfinished, path)
        files.fsync_directory(self.directory)

    @contextmanager
    def open(self, tokens: Int64) -> Iterator[SavedPrefix]:
        """Within it, the prefix of exactly these tokens; it counts as used now.

        Raises:
            StoreCorruptError: the file is damaged, of another version, or of another model or other tokens; `blocks`
                raises it too.
            StorageError: it cannot be read, or is gone.
        """
        path = self._path(tokens)
        with files.storage_errors("reading", path):
            fd = files.open_file(path, os.O_RDONLY)
        try:
            with files.storage_errors("reading", path):
                header, start = _read_header(fd, path)
                self._compare(header, tokens, fd, start, path)
                with suppress(OSError):
                    os.utime(path)
            first = start + round_up(8 * len(tokens), BUNDLE_ALIGNMENT_BYTES)
            yield SavedPrefix(len(tokens), header["description"], _read_blocks(fd, path, header, first))
        finally:
            os.close(fd)

    def _compare(self, header: dict[str, Any], tokens: Int64, fd: int, start: int, path: Path) -> None:
        for name, expected in (("version", VERSION), ("identity", self.identity), ("tokens", len(tokens))):
            if header.get(name) != expected:
                raise StoreCorruptError(f"{path}: expected {name} {expected!r}, found {header.get(name)!r}")
        lying = np.empty(8 * len(tokens), np.uint8)
        if files.read_all(fd, lying, start) < lying.nbytes or not np.array_equal(lying.view(np.int64), tokens):
            raise StoreCorruptError(f"{path}: its tokens are not those that its name stands for")

    def remove(self, tokens: Int64) -> None:
        """Forget a prefix, if it is there."""
        with suppress(FileNotFoundError), files.storage_errors("removing", self._path(tokens)):
            self._path(tokens).unlink()


def _padded(data: Bytes, nbytes: int | None = None) -> Bytes:
    whole = files.aligned_buffer(round_up(data.nbytes, BUNDLE_ALIGNMENT_BYTES) if nbytes is None else nbytes)
    view: Bytes = np.frombuffer(whole.data, np.uint8)
    view[: data.nbytes] = data
    return view


def _header(identity: str, tokens: Int64, description: dict[str, Any], sizes: list[int], checksums: list[int]) -> bytes:
    content = {
        "version": VERSION,
        "identity": identity,
        "tokens": len(tokens),
        "description": description,
        "sizes": sizes,
        "checksums": [f"{checksum:016x}" for checksum in checksums],
    }
    text = json.dumps(content).encode()
    head = _MAGIC + len(text).to_bytes(8, "little") + xxhash.xxh3_64_intdigest(text).to_bytes(8, "little") + text
    return head.ljust(round_up(len(head), BUNDLE_ALIGNMENT_BYTES), b"\0")


def _read_header(fd: int, path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where what follows it starts."""
    preamble = np.empty(_PREAMBLE_NBYTES, np.uint8)
    if files.read_all(fd, preamble, 0) < _PREAMBLE_NBYTES or preamble[:8].tobytes() != _MAGIC:
        raise StoreCorruptError(f"{path}: not a saved prefix")
    length, checksum = (int(number) for number in preamble[8:].view("<u8"))
    if length > os.fstat(fd).st_size:
        raise StoreCorruptError(f"{path}: its header is longer than the file")
    text = np.empty(length, np.uint8)
    if files.read_all(fd, text, _PREAMBLE_NBYTES) < length or xxhash.xxh3_64_intdigest(text.data) != checksum:
        raise StoreCorruptError(f"{path}: the header does not have its checksum")
    header: dict[str, Any] = json.loads(text.tobytes())
    return header, round_up(_PREAMBLE_NBYTES + length, BUNDLE_ALIGNMENT_BYTES)


def _read_blocks(fd: int, path: Path, header: dict[str, Any], place: int) -> Iterator[Bytes]:
    """Blocks one after the other, each in memory of its own until the next."""
    buffer = files.aligned_buffer(max(header["sizes"], default=BUNDLE_ALIGNMENT_BYTES))
    for number, (size, checksum) in enumerate(zip(header["sizes"], header["checksums"], strict=True)):
        block = buffer[:size]
        with files.storage_errors("reading", path):
            count = files.read_all(fd, block, place)
        if count < size or xxhash.xxh3_64_intdigest(block.data) != int(checksum, 16):
            raise StoreCorruptError(f"{path}: block {number} does not have its checksum")
        place += size
        yield block
