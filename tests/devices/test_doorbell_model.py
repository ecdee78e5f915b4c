"""The doorbell's protocol under memory that reorders: right as it is, wrong without any of its parts."""

from __future__ import annotations

import pytest

from tests.devices.doorbell_model import (
    INPUT,
    OUTPUT,
    REPLY,
    REQUEST,
    SERVER,
    STREAM,
    Load,
    Operation,
    Program,
    ProtocolError,
    Store,
    Wait,
    explore,
)


@pytest.mark.parametrize(("layers", "turns"), [(1, 4), (2, 5), (3, 4)])
def test_no_interleaving_reads_too_early_or_hangs(layers: int, turns: int) -> None:
    assert explore(STREAM, SERVER, layers, turns) > 100


def without(program: Program, operation: Operation, *instead: Operation) -> Program:
    assert operation in program
    return tuple(new for old in program for new in (instead if old == operation else (old,)))


CLEARS_REQUEST = Store(REQUEST, "0", released=True)
CLEARS_REPLY = Store(REPLY, "0", released=True)
RINGS, ANSWERS = Store(REQUEST, "layer", released=True), Store(REPLY, "layer", released=True)
LOOKS, READS = Wait(REQUEST, layer=False), Load(INPUT, expect=True)
CHANGES = {
    "the request overtakes the hidden states": (without(STREAM, RINGS, Store(REQUEST, "layer")), SERVER),
    "the reply overtakes the sums": (STREAM, without(SERVER, ANSWERS, Store(REPLY, "layer"))),
    "the request is not cleared": (STREAM, without(SERVER, CLEARS_REQUEST)),
    "the request is cleared after the reply": (
        STREAM, without(without(SERVER, CLEARS_REQUEST), ANSWERS, ANSWERS, CLEARS_REQUEST)
    ),
    "the reply is not cleared": (without(STREAM, CLEARS_REPLY), SERVER),
    "the reply is not waited for": (without(STREAM, Wait(REPLY)), SERVER),
    "hidden states are read before the request is seen": (
        STREAM, without(without(SERVER, READS), LOOKS, Load(INPUT), LOOKS)
    ),
    "hidden states are written after the request": ((STREAM[1], STREAM[0], *STREAM[2:]), SERVER),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_every_part_is_needed(change: str) -> None:
    """With one layer, whose requests look alike."""
    stream, server = CHANGES[change]
    with pytest.raises(ProtocolError):
        explore(stream, server, 1, 4)


def test_sums_are_read_when_they_are_there() -> None:
    early = (STREAM[0], STREAM[1], Load(OUTPUT, expect=True), *STREAM[2:4])
    with pytest.raises(ProtocolError, match="belongs to 0"):
        explore(early, SERVER, 1, 2)
