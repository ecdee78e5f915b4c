"""Many tokens over three tiers: experts cross the link once while others compute, and are summed in ascending order.

Experts are gone through in order. Those above start there; of those below the schedule says which the CPU computes
in place and which are copied first. Copies run while the CPU computes later experts; outputs wait for their turn to be
summed, so the sums have the bits of a run on two tiers. Experts that the prompt is routed to most stay above, but for
as many slots as the others pass through.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offload.devices.base import Work
from offload.moe.accumulate import OrderedAccumulator
from offload.moe.in_order import borrowed_in_order
from offload.moe.routing import Ints, Routing
from offload.tiers.accelerated import TierPair
from placement.planner import GROUP_NBYTES

COPIES_AHEAD = 2
"""So many are under way while the CPU goes on; a further one waits for the first of them."""

_MOST_TURNS = 4
"""So many experts wait to be summed, at most: the accelerator computes one while the CPU goes on to the next."""


_MOST_PASSING = 3
"""Slots through which experts pass that are used less than what else is above."""


class PromptPopularity:
    """Tokens of the last prompt that were routed to each expert.

    Attributes:
        passing: experts above that took a slot from one that is used more; they are the next to go.
    """

    def __init__(self) -> None:
        self.passing: set[int] = set()
        self._tokens: dict[int, int] = {}
        self._prompt_is_over = False

    def note(self, loads: Mapping[int, int]) -> None:
        """A chunk of a prompt was routed: tokens by expert."""
        if self._prompt_is_over:
            self._prompt_is_over = False
            self._tokens.clear()
        for key, tokens in loads.items():
            self._tokens[key] = self._tokens.get(key, 0) + tokens

    def decoding(self) -> None:
        """The next chunk is another prompt's."""
        self._prompt_is_over = True

    def victim(self, key: int, here: Collection[int], pinned: Collection[int], slots: int) -> int | None:
        """Who gives way to `key`: the expert with the fewest tokens, if it has no more than `key`, or one that passes.

        So but for a few slots what a prompt uses most stays, whatever else has to go through.

        Args:
            key: the expert that comes.
            here: experts above.
            pinned: those of them that cannot go.
            slots: how many there are above.
        """
        self.passing.intersection_update(here)
        free = [other for other in here if other not in pinned]
        coldest = self._coldest(free)
        if coldest is not None and self._tokens.get(coldest, 0) <= self._tokens.get(key, 0):
            self.passing.discard(coldest)
            return coldest
        if len(self.passing) >= min(_MOST_PASSING, max(1, slots // 2)):
            coldest = self._coldest([other for other in free if other in self.passing])
        if coldest is not None:
            self.passing.discard(coldest)
            self.passing.add(key)
        return coldest

    def _coldest(self, keys: Iterable[int]) -> int | None:
        # The last of equals, for layers come in order.
        return min(keys, key=lambda key: (self._tokens.get(key, 0), -key), default=None)


class StartAlone(Protocol):
    """Starts one borrowed expert on the accelerator (`above`) or on the CPU; outputs fp32 [its pairs, H] to `out`."""

    def __call__(self, key: int, *, above: bool, out: torch.Tensor) -> Work:
        """Start it."""
        ...


@dataclass
class _Turn:
    """An expert that waits for its turn to be summed.

    Attributes:
        key: the expert.
        pairs: its pairs.
        out: where its outputs go.
        above: whether it is borrowed above.
        copying: whether it is on its way there, borrowed below.
        work: what was started.
    """

    key: int
    pairs: Ints | slice
    out: torch.Tensor
    above: bool = False
    copying: bool = False
    work: Work | None = None


class Prefill:
    """One layer's step of many pairs."""

    def __init__(
        self,
        tiers: TierPair,
        popularity: PromptPopularity,
        routing: Routing,
        accumulator: OrderedAccumulator,
        start: StartAlone,
    ) -> None:
        self._tiers = tiers
        self._popularity = popularity
        self._routing = routing
        self._accumulator = accumulator
        self._start = start
        self._turns: deque[_Turn] = deque()
        self._waiting_nbytes = 0

    def run(
        self,
        numbers: Mapping[int, int],
        cached: set[int],
        rest: Sequence[int],
        to_copy: set[int],
        shares: Sequence[float] | None = None,
    ) -> None:
        """Compute and sum all experts.

        Args:
            numbers: place of each in the routing, in ascending order.
            cached: those that are borrowed above.
            rest: the others, ascending.
            to_copy: those of the others that are to be copied.
            shares: of the others; see `ExpertTier.borrow`.
        """
        in_turn = borrowed_in_order(self._tiers.below, rest, shares)
        keep: bool | None = None
        for key, number in numbers.items():
            _, pairs = self._routing.select([number])
            turn = _Turn(key, pairs, self._buffer(len(self._routing.rows[pairs])))
            if key in cached:
                turn.above = True
                turn.work = self._start(key, above=True, out=turn.out)
            else:
                in_turn.send(keep)
                keep = key in to_copy and self._begin_copy(key)
                turn.copying = keep
                if not keep:
                    turn.work = self._start(key, above=False, out=turn.out)
            self._turns.append(turn)
            self._waiting_nbytes += turn.out.nbytes
            self._sum(all_of_them=False)
        in_turn.close()
        if rest and not keep:
            self._tiers.below.give_back([rest[-1]])
        self._sum(all_of_them=True)

    def _buffer(self, rows: int) -> torch.Tensor:
        return torch.empty(rows, self._accumulator.result().shape[1], dtype=torch.float32, device="cpu")

    def _begin_copy(self, key: int) -> bool:
        """Copy an expert that is borrowed below; False where no slot above, or too few below, can be spared."""
        above, below = self._tiers.above, self._tiers.below
        copying = [turn.key for turn in self._turns if turn.copying]
        if len(copying) + 2 > below.table.usable_slots:
            return False
        if not above.table.free_slots:
            table = above.table
            victim = self._popularity.victim(key, set(table), table.pinned, table.usable_slots)
            if victim is None:
                return False
            above.evict(victim)
        return self._tiers.start_copy(key, copying)

    def _sum(self, *, all_of_them: bool) -> None:
        """Sum experts whose turn it is, those that have to be waited for only where too much waits."""
        while self._turns:
            copying = [turn for turn in self._turns if turn.copying]
            for key in self._tiers.above.poll([turn.key for turn in copying]):
                self._has_arrived(next(turn for turn in copying if turn.key == key))
            first = self._turns[0]
            too_much = (
                len(copying) > COPIES_AHEAD or len(self._turns) > _MOST_TURNS or self._waiting_nbytes > GROUP_NBYTES
            )
            on_accelerator = first.work is None or first.above
            if on_accelerator and not (too_much or all_of_them):
                return
            if first.copying:
                while not self._tiers.above.collect([first.key]):
                    self._tiers.above.start_loads([first.key])
                self._has_arrived(first)
            self._finish(self._turns.popleft())

    def _has_arrived(self, turn: _Turn) -> None:
        turn.copying, turn.above = False, True
        self._tiers.below.give_back([turn.key])
        turn.work = self._start(turn.key, above=True, out=turn.out)

    def _finish(self, turn: _Turn) -> None:
        if turn.work is not None:
            turn.work.finish()
        if turn.above:
            self._tiers.above.give_back([turn.key])
        self._accumulator.add(turn.pairs, turn.out)
        self._waiting_nbytes -= turn.out.nbytes
