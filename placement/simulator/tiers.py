"""Where experts are while a plan is simulated: the runtime's policies over slots in VRAM and in RAM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from prefetch.policies.base import CachePolicy
from prefetch.policies.lru import LruPolicy
from prefetch.traces.replay import CacheModel


class Found(NamedTuple):
    """Where a layer's experts were when it was routed; `copied` are those of the others that go to VRAM first."""

    in_vram: list[int]
    in_ram: list[int]
    missing: list[int]
    copied: set[int]


Choose = Callable[[list[int], list[int], list[int]], set[int]]
"""From experts in VRAM, in RAM and on disk to those that are copied to VRAM."""


class SimulatedTiers:
    """An expert is in one tier at most. What is copied to VRAM leaves RAM, and what VRAM gives up comes back there."""

    def __init__(self, policy: CachePolicy, ram_slots: int, vram_slots: int) -> None:
        self.below = CacheModel(policy, max(1, ram_slots))
        self.above = CacheModel(LruPolicy(), vram_slots) if vram_slots else None

    def preload(self, experts: int) -> None:
        """As the runtime loads: VRAM is filled in the order of keys, RAM where all others have a slot."""
        above = 0 if self.above is None else min(experts, self.above.slots)
        if self.above is not None:
            self.above.load(range(above), set())
        if self.below.slots >= experts - above:
            self.below.load(range(above, experts), set())

    def step(self, keys: Sequence[int], shares: list[float] | None, choose: Choose) -> Found:
        """A layer needs `keys`."""
        above = self.above
        if above is None:
            missing = self.below.step(keys, shares)
            if not missing:
                return Found([], list(keys), missing, set())
            lost = set(missing)
            return Found([], [key for key in keys if key not in lost], missing, set())
        above.policy.on_route(keys)
        in_vram = [key for key in keys if key in above.resident]
        rest = [key for key in keys if key not in above.resident]
        places = {key: place for place, key in enumerate(keys)}
        missing = self.below.step(rest, None if shares is None else [shares[places[key]] for key in rest])
        lost = set(missing)
        in_ram = [key for key in rest if key not in lost]
        copied = choose(in_vram, in_ram, missing) if rest else set()
        return Found(in_vram, in_ram, missing, {key for key in rest if key in copied and self._promote(key, set(keys))})

    def _promote(self, key: int, held: set[int]) -> bool:
        """Move an expert up, and who makes place for it down; False where every slot is held."""
        assert self.above is not None
        victims = self.above.policy.victims(held, 1) if len(self.above.resident) >= self.above.slots else []
        if len(self.above.resident) - len(victims) >= self.above.slots:
            return False
        if key in self.below.resident:
            self.below.drop(key)
        for victim in victims:
            self.above.drop(victim)
            self.below.load([victim], set())
        self.above.load([key], held)
        return True
