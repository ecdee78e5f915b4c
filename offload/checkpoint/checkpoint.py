"""An open checkpoint: its tensors by name, their bytes on demand, and whether it is still the same."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch

from offload.checkpoint.direct import DirectReader
from offload.checkpoint.dtypes import TORCH_DTYPES
from offload.checkpoint.encoded import EncodedMatrix
from offload.checkpoint.files import FileIdentity, open_regular, read_exactly
from offload.checkpoint.headers import FileHeader
from offload.checkpoint.index import read_files
from offload.checkpoint.mismatch import mismatch
from offload.errors import CheckpointChangedError, CheckpointNotFoundError, ClosedError, InvalidArgumentError
from placement.tensors import EncodedSpan, TensorSpan


class Checkpoint:
    """A checkpoint on disk whose headers have been read and found sound.

    Reading is safe from several threads at once; `close` waits for reads in progress.

    Attributes:
        directory: absolute.
        tensors: by the checkpoint's key.
        identity: hex digest that changes whenever a weight may have changed. Copies in a Hub cache with the same
            blobs have the same identity; other copies do not.
        nbytes: bytes of all tensors.
    """

    directory: Path
    tensors: Mapping[str, TensorSpan]
    identity: str
    nbytes: int

    def __init__(self, directory: Path, headers: Mapping[str, FileHeader]) -> None:
        self.directory = directory
        self.tensors = MappingProxyType(
            {name: span for header in headers.values() for name, span in header.tensors.items()}
        )
        self.nbytes = sum(span.nbytes for span in self.tensors.values())
        self.identity = _identity(headers)
        self._files = {header.path: header.identity for header in headers.values()}
        self._descriptors: dict[str, int] = {}
        self._direct = DirectReader()
        self._readers = 0
        self._closed = False
        self._condition = threading.Condition()

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Checkpoint:
        """Read and check the headers of the checkpoint in a directory.

        Raises:
            CheckpointNotFoundError: no such directory, or a file of the checkpoint is missing.
            CheckpointError: an index or a header is not sound.
        """
        path = Path(os.path.abspath(directory))  # noqa: PTH100
        if not path.is_dir():
            raise CheckpointNotFoundError(
                f"{path}: expected a directory with a checkpoint, found {'a file' if path.exists() else 'nothing'}. "
                "Fix: pass the directory that holds config.json."
            )
        return cls(path, read_files(path))

    def read(self, span: TensorSpan, *, once: bool = False) -> torch.Tensor:
        """Read a tensor, or any part of one, into fresh memory.

        Args:
            span: of a file of this checkpoint.
            once: the bytes will not be read again: keep them out of the page cache.

        Returns:
            a contiguous CPU tensor of the span's shape and dtype; of an EncodedSpan its weights.

        Raises:
            CheckpointChangedError: the file was replaced before its first read, or is shorter than it was.
            StorageError: the device keeps reporting errors.
            ClosedError: the checkpoint was closed.
        """
        if isinstance(span, EncodedSpan):
            return self._read_decoded(span, once)
        dtype = TORCH_DTYPES.get(span.dtype)
        if dtype is None:
            raise mismatch(span.file, expected="a dtype that torch has", found=span.dtype, fix="convert the checkpoint")
        stored = torch.empty(span.nbytes, dtype=torch.uint8)
        if span.nbytes:
            self.read_into(span, stored.numpy().data, once=once)
        return stored.view(dtype).reshape(span.shape)

    def read_encoded(self, span: EncodedSpan, *, once: bool = False) -> EncodedMatrix:
        """Read codes and scales of one matrix: as `read`, in the orientation in which they are stored."""
        codes, scales = self.read(span.codes, once=once), self.read(span.scales, once=once)
        return EncodedMatrix(span.encoding, codes, scales, span.block)

    def _read_decoded(self, span: EncodedSpan, once: bool) -> torch.Tensor:
        decoded = torch.empty(span.shape, dtype=TORCH_DTYPES[span.dtype])
        if len(span.shape) > 2:
            for index in range(span.shape[0]):
                decoded[index] = self._read_decoded(span.entry(index), once)
            return decoded
        self.read_encoded(span, once=once).decode_into(decoded.mT if span.transposed else decoded)
        return decoded

    def read_into(self, span: TensorSpan, buffer: memoryview, *, once: bool = False) -> None:
        """Read a span's bytes into memory of the caller's: as `read`, `buffer` being span.nbytes writable bytes."""
        if isinstance(span, EncodedSpan):
            raise InvalidArgumentError(
                f"{span.file}: weights that are stored as codes and scales have no bytes to read"
            )
        if buffer.nbytes != span.nbytes:
            raise InvalidArgumentError(f"a buffer of {buffer.nbytes} bytes for a span of {span.nbytes}")
        with self._descriptor(span.file) as descriptor:
            if once:
                self._direct.read(descriptor, buffer.cast("B"), span.offset, span.file)
            else:
                read_exactly(descriptor, buffer.cast("B"), span.offset, span.file)

    def check_unchanged(self) -> None:
        """Raise CheckpointChangedError if a file was replaced, rewritten or removed since the checkpoint was opened."""
        for path, identity in self._files.items():
            try:
                now: FileIdentity | None = FileIdentity.of(Path(path).stat())
            except OSError:
                now = None
            if now != identity:
                raise _changed(path, "removed" if now is None else "replaced or rewritten")

    def close(self) -> None:
        """Close all files once reads in progress have ended; closing again does nothing."""
        with self._condition:
            self._closed = True
            self._condition.wait_for(lambda: self._readers == 0)
            descriptors = list(self._descriptors.values())
            self._descriptors.clear()
        self._direct.close()
        for descriptor in descriptors:
            os.close(descriptor)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.directory)!r}, {len(self.tensors)} tensors, {self.nbytes} bytes)"

    @contextmanager
    def _descriptor(self, path: str) -> Iterator[int]:
        """The file's descriptor, which stays open until the block is left."""
        with self._condition:
            if self._closed:
                raise ClosedError(f"{path}: the checkpoint was closed; open it again")
            if path not in self._descriptors:
                self._descriptors[path] = self._open_same(path)
            self._readers += 1
            descriptor = self._descriptors[path]
        try:
            yield descriptor
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    def _open_same(self, path: str) -> int:
        if path not in self._files:
            raise InvalidArgumentError(f"{path} is no file of the checkpoint in {self.directory}")
        descriptor, identity = open_regular(path)
        if identity != self._files[path]:
            os.close(descriptor)
            raise _changed(path, "replaced or rewritten")
        return descriptor


def _changed(path: str, how: str) -> CheckpointChangedError:
    return CheckpointChangedError(
        f"{path}: expected the file as it was when the checkpoint was opened, found it {how}. Fix: let the download or "
        "conversion that writes there finish, then load the model again."
    )


def _identity(headers: Mapping[str, FileHeader]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, header in sorted(headers.items()):
        fields = (name, str(header.identity.size), header.digest, _content_identity(header))
        digest.update("\0".join(fields).encode() + b"\0\0")
    return digest.hexdigest()


def _content_identity(header: FileHeader) -> str:
    """What stands for the bytes of a file without reading them: a Hub blob's name is the digest of its content."""
    path = Path(header.path)
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs":
        return f"blob {target.name}"
    return f"file {header.identity.inode} {header.identity.mtime_ns}"
