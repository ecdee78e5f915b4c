"""The one form in which a damaged checkpoint is reported."""

from __future__ import annotations

import os

from offload.errors import CheckpointError

DOWNLOAD_AGAIN = "download the file again, or take it from a copy that loads elsewhere"


def mismatch(
    path: str | os.PathLike[str],
    *,
    expected: str,
    found: str,
    tensor: str | None = None,
    fix: str = DOWNLOAD_AGAIN,
) -> CheckpointError:
    """The error to raise where a file is not what it should be.

    Args:
        path: the file.
        expected: what a sound file has there.
        found: what this one has.
        tensor: the tensor concerned, where it is one.
        fix: what the user can do.
    """
    where = f"{os.fspath(path)}" if tensor is None else f"{os.fspath(path)}, tensor {tensor!r}"
    return CheckpointError(f"{where}: expected {expected}, found {found}. Fix: {fix}.")
