"""Compiling on two cores.

Numba compiles one function at a time in a process, most of the time in Python. So another process goes through the same
list from its end, and whoever comes to what is kept already loads it. Nothing else is said between the two.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from cpu_kernels.compiling.compiler import prepare
from cpu_kernels.compiling.kept import KeptFunctions

Kernel = tuple[Callable[..., object], tuple[Any, ...]]
"""A function of a module that compiles something or loads it, and its arguments, which can be pickled."""

_ENDED_AT_ITS_INPUTS_END = 0


def prepare_named(module: str, name: str) -> None:
    """`prepare` an `entry` of a module; a compiled function cannot be sent to another process, its name can."""
    prepare(getattr(import_module(module), name))


def compile_together(kernels: Sequence[Kernel], *, processes: int = 2) -> None:
    """Compile or load each; once one was compiled, with another process, if `processes` is 2."""
    other: _OtherProcess | None = None
    try:
        for place, (function, arguments) in enumerate(kernels, 1):
            before = KeptFunctions.compiled
            function(*arguments)
            if processes > 1 and KeptFunctions.compiled > before:
                processes = 1
                try:
                    other = _OtherProcess([*reversed(kernels[place:])])
                except OSError as error:
                    _warn(f"could not be started ({error})")
    finally:
        if other is not None:
            other.end()


class _OtherProcess:
    def __init__(self, kernels: list[Kernel]) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cpu_kernels.compiling.together"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
        )
        # It may have ended already, which `end` tells.
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.write(pickle.dumps(kernels))
            self._process.stdin.flush()

    def end(self) -> None:
        """Let it finish what it compiles, and nothing after that."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        code = self._process.wait()
        if code != _ENDED_AT_ITS_INPUTS_END:
            _warn(f"ended with code {code}")


def _warn(what: str) -> None:
    warnings.warn(
        f"a second process that compiles kernels {what}: what is done once takes longer", RuntimeWarning, stacklevel=3
    )


def _main() -> None:
    source = sys.stdin.buffer
    for function, arguments in pickle.load(source):
        if select.select([source], [], [], 0)[0]:
            break
        function(*arguments)


if __name__ == "__main__":
    _main()
