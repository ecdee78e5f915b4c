"""What engines without threads share: a seeded chance decides who goes on, and how far, at every call."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any


class Turns:
    """Before an engine among a class's bases: reads go on by a few turns at every call, and as far as they must when
    somebody waits.

    Attributes:
        chance: decides.
        turns: taken so far.
        interrupt_at: the turn of a wait at which whoever waits is interrupted; None for never.
    """

    chance: random.Random
    turns: int = 0
    interrupt_at: int | None = None

    def _start(self) -> None:
        """No threads."""

    @abstractmethod
    def turn(self) -> bool:
        """One reader goes on to where others may come between, or begins a chunk; False where nobody has work."""

    def some_turns(self, most: int = 6) -> None:
        for _ in range(self.chance.randint(0, most)):
            self.turn()

    def submit(self, *arguments: Any) -> Any:
        ticket = super().submit(*arguments)  # type: ignore[misc]
        self.some_turns()
        return ticket

    def promote(self, ticket: Any) -> None:
        super().promote(ticket)  # type: ignore[misc]
        self.some_turns()

    def cancel(self, ticket: Any) -> None:
        super().cancel(ticket)  # type: ignore[misc]
        self.some_turns()

    def wait_any(self, tickets: Iterable[Any]) -> None:
        waiting = tuple(tickets)
        self._until(lambda: any(ticket.finished for ticket in waiting))

    def wait_all(self, tickets: Iterable[Any]) -> None:
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
        self.cancel_all()  # type: ignore[attr-defined]
        super().close()  # type: ignore[misc]
