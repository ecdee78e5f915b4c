"""Making the store's system calls fail, or be the last that the process makes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload.store import files

CHANGING_CALLS = ("open_file", "pwrite", "fsync", "rename", "mkdir", "unlink", "rmdir")


class Calls:
    """Counts the calls that may change the disk, and hands each to `before` with its number from 1."""

    def __init__(self, before: Callable[[int, str, tuple[Any, ...]], None], names: tuple[str, ...] = CHANGING_CALLS):
        self.log: list[tuple[str, Any]] = []
        self._before = before
        self._names = names

    def install(self, patch: pytest.MonkeyPatch) -> Calls:
        for name in self._names:
            patch.setattr(files, name, self._wrap(name, getattr(files, name)))
        return self

    def _wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            target = args[0] if isinstance(args[0], Path) else Path(f"/proc/self/fd/{args[0]}").readlink()
            self.log.append((name, target))
            self._before(len(self.log), name, args)
            return call(*args)

        return wrapped


def in_child(body: Callable[[], object]) -> int:
    """Pid of a forked child that runs `body` and exits with 0, or 1 if it raises."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
