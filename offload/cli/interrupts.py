"""Ctrl-C that is not lost."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def noted_interrupts() -> Iterator[Callable[[], None]]:
    """Within the block an interrupt is noted, besides being raised as ever: Python drops exceptions that come up in a
    finaliser or in a callback from C, and the interrupt with them.

    Yields:
        what raises KeyboardInterrupt if there was an interrupt; to be called now and then.
    """
    asked = False

    def note(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    def tell(dropped: Any) -> None:
        # What was noted is not lost, and nobody wants a traceback of it.
        if not (asked and issubclass(dropped.exc_type, KeyboardInterrupt)):
            told(dropped)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        # Signals are another's here.
        yield check
        return
    told, sys.unraisablehook = sys.unraisablehook, tell
    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = told
