"""Many tokens over three tiers: experts cross the link once while others compute, and are summed in ascending order.

Experts are gone through in order. Those above start there, several with one call; of those below the schedule says
which the CPU computes in place and which are copied first. Copies run while the CPU computes later experts; outputs
wait for their turn to be summed, so the sums have the bits of a run on two tiers. Experts that the prompt is routed to
most stay above, but for as many slots as the others pass through.
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
from placement.outputs import GROUP_NBYTES

COPIES_AHEAD = 2
"""So many are under way while the CPU goes on; a further one waits for the first of them."""

_MOST_CALLS = 4
"""Outputs of so many calls wait to be summed, at most: the accelerator computes some while the CPU goes on."""


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


class StartExperts(Protocol):
    """Starts borrowed experts, ascending, on the accelerator (`above`) or on the CPU, with one call.

    Their outputs, fp32 [their pairs, H], go to `out`, one expert after the other.
    """

    def __call__(self, keys: Sequence[int], *, above: bool, out: torch.Tensor) -> Work:
        """Start them."""
        ...


class _Call(Work):
    """What was started with one call, for each of the experts in it to finish.

    Attributes:
        done: whether the outputs are there.
    """

    def __init__(self, work: Work) -> None:
        self.done = False
        self._work = work

    def finish(self) -> None:
        """Return when the outputs are there."""
        if not self.done:
            self._work.finish()
            self.done = True


@dataclass
class _Turn:
    """An expert that waits for its turn to be summed.

    Attributes:
        key: the expert.
        pairs: its pairs.
        out: where its outputs go.
        above: whether it is borrowed above.
        copying: whether it is on its way there, borrowed below.
        call: what was started.
    """

    key: int
    pairs: Ints | slice
    out: torch.Tensor
    above: bool = False
    copying: bool = False
    call: _Call | None = None


class Prefill:
    """One layer's step of many pairs."""

    def __init__(
        self,
        tiers: TierPair,
        popularity: PromptPopularity,
        routing: Routing,
        accumulator: OrderedAccumulator,
        start: StartExperts,
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
        groups = {group[0]: group for group in self._groups(numbers, cached)}
        started: dict[int, tuple[torch.Tensor, _Call]] = {}
        keep: bool | None = None
        for key, number in numbers.items():
            _, pairs = self._routing.select([number])
            if key in cached:
                if key in groups:
                    started.update(self._start_group(groups[key], numbers))
                out, call = started.pop(key)
                turn = _Turn(key, pairs, out, above=True, call=call)
            else:
                turn = _Turn(key, pairs, self._buffer(self._pairs_of(number)))
                in_turn.send(keep)
                keep = key in to_copy and self._begin_copy(key)
                turn.copying = keep
                if not keep:
                    turn.call = _Call(self._start([key], above=False, out=turn.out))
            self._turns.append(turn)
            self._waiting_nbytes += turn.out.nbytes
            self._sum(all_of_them=False)
        in_turn.close()
        if rest and not keep:
            self._tiers.below.give_back([rest[-1]])
        self._sum(all_of_them=True)

    def _groups(self, numbers: Mapping[int, int], cached: set[int]) -> list[list[int]]:
        """Experts above, ascending, as they are computed: those of a group have few enough pairs, or it is one."""
        groups: list[list[int]] = []
        room = 0
        for key, number in numbers.items():
            if key in cached:
                pairs = self._pairs_of(number)
                if not groups or pairs > room:
                    groups.append([])
                    room = self._accumulator.most_pairs
                groups[-1].append(key)
                room -= pairs
        return groups

    def _start_group(self, keys: list[int], numbers: Mapping[int, int]) -> dict[int, tuple[torch.Tensor, _Call]]:
        """Where the outputs of each go, and what they wait for."""
        pairs = [self._pairs_of(numbers[key]) for key in keys]
        out = self._buffer(sum(pairs))
        call = _Call(self._start(keys, above=True, out=out))
        return {key: (part, call) for key, part in zip(keys, out.split(pairs), strict=True)}

    def _pairs_of(self, number: int) -> int:
        return int(self._routing.offsets[number + 1] - self._routing.offsets[number])

    def _buffer(self, rows: int) -> torch.Tensor:
        return torch.empty(rows, self._accumulator.hidden, dtype=torch.float32, device="cpu")

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
            on_accelerator = first.call is None or (first.above and not first.call.done)
            if on_accelerator and not (all_of_them or self._too_much_waits(len(copying))):
                return
            if first.copying:
                while not self._tiers.above.collect([first.key]):
                    self._tiers.above.start_loads([first.key])
                self._has_arrived(first)
            self._finish(self._turns.popleft())

    def _too_much_waits(self, copying: int) -> bool:
        calls = copying + len({id(turn.call) for turn in self._turns if turn.call is not None})
        return copying > COPIES_AHEAD or calls > _MOST_CALLS or self._waiting_nbytes > GROUP_NBYTES

    def _has_arrived(self, turn: _Turn) -> None:
        turn.copying, turn.above = False, True
        self._tiers.below.give_back([turn.key])
        turn.call = _Call(self._start([turn.key], above=True, out=turn.out))

    def _finish(self, turn: _Turn) -> None:
        if turn.call is not None:
            turn.call.finish()
        if turn.above:
            self._tiers.above.give_back([turn.key])
        self._accumulator.add(turn.pairs, turn.out)
        self._waiting_nbytes -= turn.out.nbytes
