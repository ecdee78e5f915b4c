"""Before a fork nothing is in the middle of a step: a child would have half of it in its slot table."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol

# Hooks before a fork run in the reverse order: steps end before reader threads are held, or they would wait for reads.
import offload.tiers.transfer  # noqa: F401


class Stepping(Protocol):
    """What has steps.

    Attributes:
        lock: held during each.
    """

    lock: threading.RLock


_STEPPING: weakref.WeakSet[Stepping] = weakref.WeakSet()
_lock = threading.Lock()
_held: list[Stepping] = []


def hold_at_fork(one: Stepping) -> None:
    """Take its lock before every fork from now on, and give it back after it, in parent and child."""
    with _lock:
        _STEPPING.add(one)


def _before_fork() -> None:
    _lock.acquire()
    for one in list(_STEPPING):
        one.lock.acquire()
        _held.append(one)


def _after_fork() -> None:
    while _held:
        _held.pop().lock.release()
    _lock.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
