"""The doorbell as two programs over memory that reorders, explored to the last interleaving.

Each side's stores become visible in any order, one by one, with two exceptions: stores to one word stay in order, and a
released store waits for all before it. That is weaker than x86-64 and PCIe are. A program is a list of operations for
each request; the checker goes through every state that the two can reach.
"""

from __future__ import annotations

from dataclasses import dataclass

REQUEST, REPLY, INPUT, OUTPUT = range(4)


@dataclass(frozen=True)
class Store:
    """Write a value: "layer" (its number + 1), "round" (which request of all it is), "seen" (what was loaded), or 0."""

    word: int
    value: str
    released: bool = False


@dataclass(frozen=True)
class Wait:
    """Go on when a word is the layer's number + 1; where `layer` is False anything but 0, which is then the layer."""

    word: int
    layer: bool = True


@dataclass(frozen=True)
class Load:
    """Load a word; with `expect` it must hold the number of this request."""

    word: int
    expect: bool = False


Operation = Store | Wait | Load
Program = tuple[Operation, ...]

STREAM: Program = (
    Store(INPUT, "round"),
    Store(REQUEST, "layer", released=True),
    Wait(REPLY),
    Store(REPLY, "0", released=True),
    Load(OUTPUT, expect=True),
)
SERVER: Program = (
    Wait(REQUEST, layer=False),
    Store(REQUEST, "0", released=True),
    Load(INPUT, expect=True),
    Store(OUTPUT, "seen"),
    Store(REPLY, "layer", released=True),
)


@dataclass(frozen=True)
class Side:
    """Where one side is: the request, the operation in it, its layer, what it loaded, and stores not visible yet."""

    turn: int = 0
    at: int = 0
    layer: int = 0
    seen: int = 0
    pending: tuple[tuple[int, int, bool], ...] = ()


class ProtocolError(Exception):
    """Something was read too early, or both sides wait for ever."""


def explore(stream: Program, server: Program, layers: int, turns: int) -> int:
    """Go through all states; how many there are.

    Args:
        stream: operations of the stream for each request.
        server: likewise.
        layers: requests go through so many layers again and again.
        turns: requests.

    Raises:
        ProtocolError: a load found what it must not, or a state has no way on.
    """
    programs = (stream, server)
    start = ((Side(), Side()), (0, 0, 0, 0))
    known, open_states = {start}, [start]
    while open_states:
        sides, memory = open_states.pop()
        following = []
        for which in (0, 1):
            following += _flushed(sides, memory, which)
            if sides[which].turn < turns:
                following += _advanced(sides, memory, which, programs[which], layers)
        if not following and any(side.turn < turns for side in sides):
            raise ProtocolError(f"nothing goes on from {sides} with memory {memory}")
        for state in following:
            if state not in known:
                known.add(state)
                open_states.append(state)
    return len(known)


State = tuple[tuple[Side, Side], tuple[int, ...]]


def _with(sides: tuple[Side, Side], which: int, side: Side) -> tuple[Side, Side]:
    return (side, sides[1]) if which == 0 else (sides[0], side)


def _flushed(sides: tuple[Side, Side], memory: tuple[int, ...], which: int) -> list[State]:
    side, states = sides[which], []
    for index, (word, value, released) in enumerate(side.pending):
        before = side.pending[:index]
        if (released and before) or any(other == word for other, _, _ in before):
            continue
        left = Side(side.turn, side.at, side.layer, side.seen, before + side.pending[index + 1 :])
        states.append((_with(sides, which, left), (*memory[:word], value, *memory[word + 1 :])))
    return states


def _advanced(
    sides: tuple[Side, Side], memory: tuple[int, ...], which: int, program: Program, layers: int
) -> list[State]:
    side = sides[which]
    operation = program[side.at]
    layer, seen, pending = side.layer, side.seen, side.pending
    if which == 0:
        layer = side.turn % layers + 1
    own = [value for word, value, _ in pending if word == operation.word]
    found = own[-1] if own else memory[operation.word]
    if isinstance(operation, Store):
        value = {"layer": layer, "round": side.turn + 1, "seen": seen, "0": 0}[operation.value]
        pending = (*pending, (operation.word, value, operation.released))
    elif isinstance(operation, Wait):
        if found == 0 or (operation.layer and found != layer):
            return []
        layer = found
    else:
        if operation.expect and found != side.turn + 1:
            raise ProtocolError(f"request {side.turn + 1} loaded what belongs to {found}")
        seen = found
    last = side.at + 1 == len(program)
    following = Side(side.turn + last, 0 if last else side.at + 1, layer, seen, pending)
    return [(_with(sides, which, following), memory)]
