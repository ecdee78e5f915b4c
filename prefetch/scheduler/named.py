"""Schedulers by name."""

from __future__ import annotations

from prefetch.scheduler.base import StepScheduler
from prefetch.scheduler.earliest_completion import EarliestCompletion
from prefetch.scheduler.static import StaticOrder

_SCHEDULERS: dict[str, type[StepScheduler]] = {"auto": EarliestCompletion, "off": StaticOrder}


class UnknownSchedulerError(ValueError):
    """No scheduler has this name."""


def make_scheduler(name: str) -> StepScheduler:
    """The scheduler of a name.

    Raises:
        UnknownSchedulerError: `name` is none of `prefetch.scheduler.names.SCHEDULERS`.
    """
    found = _SCHEDULERS.get(name)
    if found is None:
        raise UnknownSchedulerError(f"scheduler {name!r}: expected {' or '.join(_SCHEDULERS)}")
    return found()


def name_of(scheduler: StepScheduler) -> str:
    """Its name; of a user's own its class."""
    names = (name for name, known in _SCHEDULERS.items() if type(scheduler) is known)
    return next(names, type(scheduler).__name__)
