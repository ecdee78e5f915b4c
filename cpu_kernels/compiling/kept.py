# mypy: allow-untyped-defs, allow-untyped-calls
"""Compiled functions on disk, a file each, named after everything that they depend on.

Numba's own files are numbered and listed in an index. Two processes that compile variants of one function at a time may
give them the same number, and one then runs the other's; and a key has the outermost function's file in it only, so
that a function whose inner ones have changed is reused.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import llvmlite
import numba
from numba.core.caching import FunctionCache
from numba.core.dispatcher import Dispatcher
from numba.core.serialize import dumps

_Cache: Any = FunctionCache

_STAMP_DIGITS = 16


@cache
def source_stamp(*packages: str) -> str:
    """Digest of the sources of some packages, of this one, and of Numba's version; 16 hexadecimal digits.

    A package's name may have dots; its own packages are part of it.
    """
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for package in sorted({*packages, "cpu_kernels.compiling"}):
        for source in _sources(files(package)):
            digest.update(source)
    return digest.hexdigest()[:_STAMP_DIGITS]


def _sources(folder: Traversable) -> Iterator[bytes]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _sources(entry)
        elif entry.name.endswith(".py"):
            yield entry.read_bytes()


class _Files:
    """The files of one function, whose variants differ in signature, instructions and constants that it closes over."""

    def __init__(self, folder: str, base: str, stamp: str) -> None:
        self._folder, self._base, self._stamp = Path(folder), base, stamp

    def _path(self, key: object) -> Path:
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
        return self._folder / f"{self._base}.{self._stamp}.{digest}.nbc"

    def load(self, key: object) -> Any:
        """What was saved under a key, None if nothing was."""
        try:
            return pickle.loads(self._path(key).read_bytes())
        except FileNotFoundError:
            return None

    def save(self, key: object, data: object) -> None:
        """Keep `data`; what was compiled from other sources goes."""
        for path in self._folder.glob(f"{self._base}.*.nb[ci]"):
            if not path.name.startswith(f"{self._base}.{self._stamp}."):
                path.unlink(missing_ok=True)
        with NamedTemporaryFile(dir=self._folder, prefix=f"{self._base}.tmp.", delete=False) as file:
            file.write(dumps(data))
        Path(file.name).replace(self._path(key))


class KeptFunctions(_Cache):  # type: ignore[misc]
    """Numba's cache of one function, with files as above.

    What a function closes over is part of its key. A compiled function among that counts by its name and by what it
    closes over itself; Numba would take a number that each process draws anew, and never find it again.
    """

    compiled = 0
    """How many functions this process compiled, because they were not kept."""

    def __init__(self, function: Any, stamp: str) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, stamp)

    def save_overload(self, sig, data):
        """Keep what was compiled."""
        KeptFunctions.compiled += 1
        super().save_overload(sig, data)

    def _index_key(self, sig, codegen):
        return sig, codegen.magic_tuple(), closure_digest(self._py_func)


def closure_digest(function: Any) -> str:
    """Hexadecimal digest of a function's code and of what it closes over."""
    return hashlib.sha256(dumps(_described(function))).hexdigest()


def _described(function):
    cells = function.__closure__ or ()
    closed_over = tuple(cell.cell_contents for cell in cells)
    return (
        function.__module__,
        function.__qualname__,
        function.__code__.co_code,
        tuple(_described(value.py_func) if isinstance(value, Dispatcher) else value for value in closed_over),
    )
