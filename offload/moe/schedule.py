"""What a scheduler says is copied, checked where it is used: it may be a user's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index

from offload.errors import PartError
from prefetch.scheduler.base import StepScheduler
from prefetch.scheduler.records import Home, LayerCosts


def places_to_copy(
    scheduler: StepScheduler, loads: Sequence[int], homes: Sequence[Home], costs: LayerCosts
) -> set[int]:
    """What `StepScheduler.copies` says.

    Raises:
        PartError: it names what is no place of an expert that could be copied.
    """
    said = scheduler.copies(loads, homes, costs)
    if not isinstance(said, Iterable):
        raise _refused(scheduler, f"gave {said!r}, expected places of experts to copy")
    found = set()
    for one in said:
        try:
            place = index(one)
        except TypeError:
            raise _refused(scheduler, f"gave {one!r}, expected whole numbers") from None
        if isinstance(one, bool) or not 0 <= place < len(homes):
            raise _refused(scheduler, f"gave {one!r}, expected places from 0 to {len(homes) - 1}")
        if homes[place] < Home.RAM:
            raise _refused(scheduler, f"gave {place}, an expert that is on the accelerator already")
        found.add(place)
    return found


def _refused(scheduler: StepScheduler, found: str) -> PartError:
    return PartError(f"{type(scheduler).__name__}.copies {found}; nothing was computed of this step's layer")
