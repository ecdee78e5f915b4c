"""Temporary files of a benchmark, on the same disk as everything else."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_directory(work: Path) -> Iterator[Path]:
    """A directory under `work` that is gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="scratch-", dir=work))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
