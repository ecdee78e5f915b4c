"""Which sources compiled kernels come from."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


@cache
def source_stamp() -> str:
    """Digest of this package's sources and of the packed formats, 16 hexadecimal digits.

    It is part of the key of every cached kernel: Numba looks at the file of the outermost function only and would
    reuse a kernel whose inner functions have changed.
    """
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([*here.glob("*.py"), here.parent / "formats" / "packed.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
