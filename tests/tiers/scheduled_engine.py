"""A read engine without threads: a seeded chance decides who goes on, anywhere that threads could take turns."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator

from offload.tiers.read_queue import Reader, ReadRequest, Ticket, Urgency, serve_chunk
from offload.tiers.transfer import ReadEngine


class ScheduledEngine(ReadEngine):
    """Reads go on by a few turns at every call, and as far as they must when somebody waits.

    Attributes:
        turns: taken so far.
        interrupt_at: the turn of a wait at which whoever waits is interrupted; None for never.
    """

    def __init__(self, reader: Reader, *, threads: int, chunk_nbytes: int, chance: random.Random) -> None:
        super().__init__(reader, threads=threads, chunk_nbytes=chunk_nbytes)
        self.chance = chance
        self.turns = 0
        self.interrupt_at: int | None = None
        self._running: list[Iterator[None]] = []

    def _start(self) -> None:
        """No threads."""

    def turn(self) -> bool:
        """One thread goes on to where others may come between, or claims a chunk; False where nobody has work."""
        queue = self._queue
        idle = queue.has_turn and len(self._running) <= queue.most_reading
        choices = len(self._running) + bool(idle)
        if not choices:
            return False
        self.turns += 1
        chosen = self.chance.randrange(choices)
        if chosen == len(self._running):
            with queue.lock:
                claimed = queue.claim()
            if claimed is not None:
                self._running.append(serve_chunk(queue, *claimed))
        elif next(self._running[chosen], self) is self:
            self._running.pop(chosen)
        return True

    def some_turns(self, most: int = 6) -> None:
        for _ in range(self.chance.randint(0, most)):
            self.turn()

    def submit(self, request: ReadRequest, urgency: Urgency) -> Ticket:
        ticket = super().submit(request, urgency)
        self.some_turns()
        return ticket

    def promote(self, ticket: Ticket) -> None:
        super().promote(ticket)
        self.some_turns()

    def cancel(self, ticket: Ticket) -> None:
        super().cancel(ticket)
        self.some_turns()

    def cancel_all(self) -> None:
        for ticket in list(self._queue.unfinished):
            super().cancel(ticket)
        while self._queue.unfinished:
            assert self.turn(), "cancelled reads never end"

    def wait_any(self, tickets: Iterable[Ticket]) -> None:
        waiting = tuple(tickets)
        self._until(lambda: any(ticket.finished for ticket in waiting))

    def wait_all(self, tickets: Iterable[Ticket]) -> None:
        waiting = tuple(tickets)
        self._until(lambda: all(ticket.finished for ticket in waiting))

    def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            if self.interrupt_at is not None and self.turns >= self.interrupt_at:
                self.interrupt_at = None
                raise KeyboardInterrupt
            assert self.turn(), "somebody waits for what nobody reads"
        self.some_turns()

    def close(self) -> None:
        self.cancel_all()
        super().close()
