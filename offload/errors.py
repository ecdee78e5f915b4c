"""Every error that the runtime raises on purpose, and the exit code that the command line gives it.

A message names the file or tensor, what was expected, what was found, and the fix. Nothing here imports
torch, so that the command line can report a bad path without paying for it.
"""

from __future__ import annotations

from typing import ClassVar


class OffloadError(Exception):
    """Base of all errors of this package; `exit_code` is what the command line ends with."""

    exit_code: ClassVar[int] = 1


class InvalidArgumentError(OffloadError, ValueError):
    """A size, setting or combination of arguments that cannot be meant; raised before any work."""

    exit_code = 2


class DoesNotFitError(OffloadError, MemoryError):
    """The model does not fit the budgets. Loading with exactly `minimum_ram_bytes` works.

    Attributes:
        minimum_ram_bytes: the least host memory with which the same request fits, in bytes.
        minimum_disk_bytes: the least free disk with which it fits, in bytes; 0 where disk is not what lacks.
    """

    exit_code = 3

    def __init__(self, message: str, *, minimum_ram_bytes: int = 0, minimum_disk_bytes: int = 0) -> None:
        super().__init__(message)
        self.minimum_ram_bytes = minimum_ram_bytes
        self.minimum_disk_bytes = minimum_disk_bytes


class CheckpointError(OffloadError):
    """The checkpoint is not what its headers, index or config say."""

    exit_code = 4


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint at that path or Hub id, or one of its files is missing."""


class CheckpointChangedError(CheckpointError):
    """A file of the checkpoint was replaced or rewritten while it was read."""


class UnsupportedModelError(CheckpointError):
    """The architecture, conversion or quantisation is one that this version does not know."""


class TraceFileError(OffloadError):
    """A file that is no routing trace, of another version, cut off or damaged."""

    exit_code = 4


class StoreError(OffloadError):
    """The expert store's directory is not usable as it is."""

    exit_code = 4


class StoreCorruptError(StoreError):
    """Bytes of the store do not match their checksum, size or manifest."""


class StoreBusyError(StoreError):
    """Another process holds the store's lock."""

    exit_code = 5


class StorageError(OffloadError, OSError):
    """Reading or writing failed after the retries: EIO, short read, full or read-only disk."""

    exit_code = 5


class HubUnreachableError(OffloadError, ConnectionError):
    """The Hub was to be asked and did not answer, or may not be asked."""

    exit_code = 5


class ClosedError(OffloadError, RuntimeError):
    """The model's runtime was closed; load it again."""


class UnsupportedOperationError(OffloadError, NotImplementedError):
    """An operation of a transformers model that cannot mean anything on an offloaded one."""


class DeviceError(OffloadError, RuntimeError):
    """An accelerator is not there, cannot be used, or refused an operation."""


class DoorbellError(DeviceError):
    """A request that an accelerator made of the CPU could not be answered."""


class PartError(OffloadError, ValueError):
    """A scheduler or a predictor of a user's own said what cannot be; the step that asked is as if it had not been."""


class CaptureError(OffloadError):
    """A decode step cannot be captured as a graph: what it does depends on more than a replay would see."""


class SlowDeviceWarning(UserWarning):
    """An accelerator does not work the fast way, or with less memory; the message says why."""


class SlowReadWarning(UserWarning):
    """Reads do not go the fast way; the message says why."""


class LearntFileWarning(UserWarning):
    """What predictors learnt in an earlier run cannot be read, or what they learnt in this one cannot be kept."""


class SlowKvWarning(UserWarning):
    """Attention does not compute where the KV cache's blocks lie; the message says why."""


class PrefixRejectedWarning(UserWarning):
    """A saved KV prefix cannot be used and is computed again; the message says why."""
