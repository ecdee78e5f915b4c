# mypy: allow-untyped-calls
"""Mappings expert by expert, keeping those that no other is better than (a beam search over partial schedules).

Resources serve in the order in which things are ready for them, and that order is the same for every mapping: what is
on the GPU, what is in RAM, what is read, each by load. So what a mapping of the first experts comes to is three clocks,
the CPU's, the GPU's and the link's, and one whose clocks are all behind another's can be forgotten: whatever follows
ends no sooner. With room for all that are left this is exact; with room for a few, those go that promise the latest
end.
Experts are numbered by load, descending.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import inner
from prefetch.scheduler.greedy_kernel import cpu_expert_s, gpu_expert_s
from prefetch.scheduler.timeline_kernel import (
    BOTH,
    CPU_FIRST,
    DISK,
    DISK_BEFORE,
    GPU_BEFORE,
    LINK,
    LINK_BEFORE,
    ON_CPU,
    ON_DISK,
    ON_GPU,
    RAM,
    VRAM,
    copy_into,
)

_CPU, _GPU, _LINK, _COLD, _PROMISE, _COLUMNS = range(6)
"""Of a partial mapping: when each is free, what the CPU's first expert still costs; and before when it cannot end."""

_PARENT, _UNIT = range(2)


@inner
def _in_order(homes: Any) -> Any:
    """Experts in the order in which resources serve them: by how far away they are, then by load."""
    order, count = np.empty(len(homes), np.int64), 0
    for nearest, furthest in ((VRAM, BOTH), (RAM, RAM), (ON_DISK, ON_DISK)):
        for expert in range(len(homes)):
            if nearest <= homes[expert] <= furthest:
                order[count] = expert
                count += 1
    return order


@inner
def _is_behind(one: Any, other: Any) -> bool:
    """Whether nothing that follows `other` ends sooner than after `one`."""
    clocks_behind = one[_CPU] <= other[_CPU] and one[_GPU] <= other[_GPU] and one[_LINK] <= other[_LINK]
    return bool(clocks_behind and one[_COLD] <= other[_COLD])


@inner
def _advance(state: Any, unit: int, home: int, arrival: float, cpu_s: float, gpu_s: float, link_s: float) -> None:
    """The next expert joins a partial mapping."""
    if unit == ON_CPU:
        state[_CPU] = max(state[_CPU], arrival) + cpu_s + state[_COLD]
        state[_COLD] = 0.0
    elif home >= RAM:
        state[_LINK] = max(state[_LINK], arrival) + link_s
        state[_GPU] = max(state[_GPU], state[_LINK]) + gpu_s
    else:
        state[_GPU] += gpu_s


@inner
def _keep(states: Any, steps: Any, count: int, width: int) -> int:
    """Let the state after the first `count` join them, in the order of promises, if none makes it needless.

    Returns:
        How many there are: those that it makes needless leave, and beyond `width` the last.
    """
    # What is behind promises no sooner end: those that promise a sooner one can only make the new one needless.
    begin, end, promise = 0, 0, states[count, _PROMISE]
    while end < count and states[end, _PROMISE] <= promise:
        if _is_behind(states[end], states[count]):
            return count
        begin += states[end, _PROMISE] < promise
        end += 1
    place, kept = begin, begin
    for index in range(begin, count):
        if not _is_behind(states[count], states[index]):
            if kept < index:
                states[kept], steps[kept] = states[index], steps[index]
            kept += 1
            place += index < end
    if place == width:
        return kept
    spare = width + 1
    states[spare], steps[spare] = states[count], steps[count]
    for index in range(kept, place, -1):
        states[index], steps[index] = states[index - 1], steps[index - 1]
    states[place], steps[place] = states[spare], steps[spare]
    return min(kept + 1, width)


@inner
def beam(loads: Any, homes: Any, costs: Any, width: int, bound: float, units: Any) -> Any:
    """The best mapping that is found, if it ends before `bound`.

    Args:
        loads: int64 [n], descending; n is at least 1.
        homes: int64 [n].
        costs: float64 [10].
        width: partial mappings that are kept.
        bound: seconds.
        units: int64 [n]; filled with the mapping.

    Returns:
        When its last expert is done; infinity where none ends before `bound`, and then `units` are as they were.
    """
    count, order = len(loads), _in_order(homes)
    arrivals, cpu_s, gpu_s = np.zeros(count), np.empty(count), np.empty(count)
    # What the experts that follow take at least, and when the last of them can be done at the earliest.
    rest, last = np.zeros(count + 1), np.zeros(count + 1)
    clock = costs[DISK_BEFORE]
    for place in range(count):
        expert = order[place]
        cpu_s[place], gpu_s[place] = cpu_expert_s(costs, loads[expert]), gpu_expert_s(costs, loads[expert])
        if homes[expert] == ON_DISK:
            clock += costs[DISK]
            arrivals[place] = clock
    for place in range(count - 1, -1, -1):
        rest[place] = rest[place + 1] + min(cpu_s[place], gpu_s[place])
        last[place] = max(last[place + 1], arrivals[place] + min(cpu_s[place], gpu_s[place]))
    # Beside those that are kept a new one, and a place to exchange them.
    states, steps = np.zeros((width + 2, _COLUMNS)), np.zeros((width + 2, 2), np.int64)
    before = np.empty((width, _COLUMNS))
    history = np.empty((count, width, 2), np.int64)
    states[0, _GPU], states[0, _LINK], states[0, _COLD] = costs[GPU_BEFORE], costs[LINK_BEFORE], costs[CPU_FIRST]
    found = 1
    for place in range(count):
        home = homes[order[place]]
        for state in range(found):
            copy_into(before[state], states[state])
        partial, found = found, 0
        for parent in range(partial):
            for unit in (ON_CPU, ON_GPU):
                if unit == ON_CPU and home == VRAM:
                    continue
                new = states[found]
                copy_into(new, before[parent])
                _advance(new, unit, home, arrivals[place], cpu_s[place], gpu_s[place], costs[LINK])
                even = 0.5 * (new[_CPU] + new[_GPU] + rest[place + 1])
                new[_PROMISE] = max(max(new[_CPU], new[_GPU]), max(even, last[place + 1]))
                if new[_PROMISE] < bound:
                    steps[found, _PARENT], steps[found, _UNIT] = parent, unit
                    found = _keep(states, steps, found, width)
        for step in range(found):
            copy_into(history[place, step], steps[step])
    if found == 0:
        return np.inf
    best = 0
    for place in range(count - 1, -1, -1):
        units[order[place]] = history[place, best, _UNIT]
        best = history[place, best, _PARENT]
    return max(states[0, _CPU], states[0, _GPU])
