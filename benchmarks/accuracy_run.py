"""One run of `benchmarks.plan_accuracy`: a model in a process of its own, and turns of it that are measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import time_ns

from benchmarks.decode import TokenStream
from benchmarks.machine import provenance
from benchmarks.peers import Peer
from benchmarks.sessions import Fed, ModelOptions
from placement.hardware_profile import Speeds

_LEAST_TURN_S = 0.75
FEWEST_PASSES, MOST_PASSES = 4, 96
MOST_TURNS = 10
_UNDISTURBED = 0.05
"""Share of the CPUs' time that others may have in a turn that counts."""


@dataclass(frozen=True)
class Turn:
    """Some prompts, one after the other, or some passes of decode.

    Attributes:
        speeds: of the machine, over the profile's, right before.
        tokens_per_s: measured.
        hit_rate: share of routed experts that were resident.
        others: share of the CPUs' time that this process did not have.
    """

    speeds: Speeds
    tokens_per_s: float
    hit_rate: float
    others: float


@dataclass(frozen=True)
class Measured:
    """What a run found.

    Attributes:
        date: UTC, when it ended.
        commit: of the runtime.
        slots: of the loaded model.
        plan_nbytes: peak that its plan states.
        before_nbytes: resident memory of the process before it was loaded.
        peak_nbytes: most resident memory since.
        prefill: turns that count: those in which others had least of the CPUs.
        decode: likewise.
        decode_passes: of one turn.
        decoded_turns: of decode that were made, whether or not they count.
    """

    date: str
    commit: str
    slots: int
    plan_nbytes: int
    before_nbytes: int
    peak_nbytes: int
    prefill: tuple[Turn, ...]
    decode: tuple[Turn, ...]
    decode_passes: int
    decoded_turns: int

    @property
    def is_disturbed(self) -> bool:
        """Whether others had more of the CPUs than a turn that counts should leave them, in any of its turns."""
        return any(one.others > _UNDISTURBED for one in (*self.prefill, *self.decode))


def passes_of_turn(passes_per_s: float) -> int:
    """Passes of a turn of decode, of which so many are expected in a second."""
    return round(min(max(_LEAST_TURN_S * passes_per_s, FEWEST_PASSES), MOST_PASSES))


def measured(
    options: ModelOptions, prompt_tokens: int, vocab: int, turns: int, passes: int, speeds: Callable[[], Speeds]
) -> Measured:
    """Load a model and measure it.

    Args:
        options: how to load it.
        prompt_tokens: of each sequence.
        vocab: token ids run from 0 to here, exclusively.
        turns: of decode and of prefill that count. They are repeated, up to MOST_TURNS, until so many were
            undisturbed.
        passes: of a turn of decode. The sequence begins with FEWEST_PASSES others, which do not count.
        speeds: probes the machine.
    """
    batch = options.batch
    # Others in every run: the policy learns from run to run, and would know the same ones by heart.
    tokens = TokenStream(vocab, time_ns())
    size = batch * prompt_tokens
    with Peer(options) as peer:
        loaded = peer.ready()
        peer.start(tokens.take(size))
        prefill, _ = _turns(lambda: _prompts(lambda: peer.prefill(tokens.take(size)), size), speeds, turns, MOST_TURNS)
        peer.start(tokens.take(size))
        peer.feed(tokens.take(batch * FEWEST_PASSES))
        decode, made = _turns(lambda: peer.feed(tokens.take(batch * passes)), speeds, turns, MOST_TURNS)
        memory = peer.memory()
    origin = provenance("")
    return Measured(
        origin["date"], origin["commit"], loaded["slots"], loaded["peak_ram_nbytes"], memory["before_nbytes"],
        memory["peak_nbytes"], prefill, decode, passes, made,
    )  # fmt: skip


def _prompts(prefill: Callable[[], Fed], size: int) -> Fed:
    """Prompts of so many tokens, as many as take as long as a turn should, as if they were one."""
    found: list[Fed] = []
    seconds = 0.0
    while not found or seconds < _LEAST_TURN_S:
        found.append(prefill())
        seconds += size / found[-1].tokens_per_s
    return Fed(
        len(found) * size / seconds,
        statistics.mean(one.disk_nbytes for one in found),
        statistics.mean(one.hit_rate or 0.0 for one in found),
        statistics.mean(one.others for one in found),
    )


def _turns(
    turn: Callable[[], Fed], speeds: Callable[[], Speeds], wanted: int, most: int
) -> tuple[tuple[Turn, ...], int]:
    """(the least disturbed of as many turns as it takes, how many that were)."""
    found: list[Turn] = []
    while len(found) < most and sum(one.others <= _UNDISTURBED for one in found) < wanted:
        before = speeds()
        one = turn()
        found.append(Turn(before, one.tokens_per_s, one.hit_rate or 0.0, one.others))
    return tuple(sorted(found, key=lambda one: one.others)[:wanted]), len(found)
