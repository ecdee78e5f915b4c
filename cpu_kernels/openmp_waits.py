"""How long threads of an OpenMP runtime wait in a loop: milliseconds, or microseconds where others need their cores."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

_PATIENCE_S = 10.0


class ShortWaits:
    """While it is open, threads of GNU OpenMP that wait for a region give their cores up after microseconds.

    They wait in a loop of 300,000 turns, which is milliseconds, or of 1000 where the runtime has more threads than the
    process has cores (libgomp, config/linux/wait.h). One more team, which sleeps, makes that so: what reads take of the
    cores, the host's part of them included, would otherwise be taken by loops.
    """

    def __init__(self, library: Path, threads: int) -> None:
        """Start the team.

        Args:
            library: a GNU OpenMP runtime that is loaded already.
            threads: of the team; all teams together must be more than the process's cores.

        Raises:
            OSError: the library cannot be opened.
            AttributeError: it is not a GNU OpenMP runtime.
        """
        self._loaded = ctypes.CDLL(str(library))
        # Called by each thread of the team, and does nothing.
        self._body = ctypes.cast(self._loaded.omp_get_thread_num, ctypes.c_void_p)
        self._parallel = self._loaded.GOMP_parallel
        self._threads = threads
        self._begun, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold_team, name="offload-short-waits", daemon=True)
        self._thread.start()
        self._begun.wait(_PATIENCE_S)

    def _hold_team(self) -> None:
        self._parallel(self._body, ctypes.c_void_p(None), ctypes.c_uint(self._threads), ctypes.c_uint(0))
        self._begun.set()
        # The runtime frees a team when the thread that it belongs to ends.
        self._ended.wait()

    def close(self) -> None:
        """Let threads wait as they did. May be called again, and in a forked child."""
        self._ended.set()
        self._thread.join(_PATIENCE_S)
