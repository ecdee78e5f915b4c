"""A read engine without threads: a seeded chance decides who goes on, anywhere that threads could take turns."""

from __future__ import annotations

import random
from collections.abc import Iterator

from offload.tiers.read_queue import Reader, serve_chunk
from offload.tiers.transfer import ReadEngine
from tests.tiers.turns import Turns


class ScheduledEngine(Turns, ReadEngine):
    """See `Turns`."""

    def __init__(self, reader: Reader, *, threads: int, chunk_nbytes: int, chance: random.Random) -> None:
        super().__init__(reader, threads=threads, chunk_nbytes=chunk_nbytes)
        self.chance = chance
        self._running: list[Iterator[None]] = []

    def turn(self) -> bool:
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

    def cancel_all(self) -> None:
        for ticket in list(self._queue.unfinished):
            super().cancel(ticket)
        while self._queue.unfinished:
            assert self.turn(), "cancelled reads never end"
