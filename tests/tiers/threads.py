"""Threads that the system refuses."""

from __future__ import annotations

import threading

import pytest


def refuse_threads(monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """So many more threads start; whoever starts another is told that the system has none."""
    start = threading.Thread.start
    left = [None] * after

    def refuse(thread: threading.Thread) -> None:
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
