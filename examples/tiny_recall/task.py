"""Synthetic recall: facts (a key, then its value) strewn over filler, then keys whose values are asked for."""

from __future__ import annotations

from typing import NamedTuple

import torch

KEYS, VALUES, FILLERS = 256, 64, 32
VOCAB = KEYS + VALUES + FILLERS
_FIRST_VALUE, _FIRST_FILLER = KEYS, KEYS + VALUES


class Facts(NamedTuple):
    """What a context tells.

    Attributes:
        context: int64 [tokens].
        keys: int64 [facts], in the order in which they are told.
        values: int64 [facts], of these.
        places: int64 [facts], where in the context each key is.
    """

    context: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor


def tell_facts(tokens: int, facts: int, generator: torch.Generator, fillers: int = FILLERS) -> Facts:
    """A context of so many tokens that tells so many facts, no key twice, at random places.

    Args:
        tokens: of the context.
        facts: that it tells.
        generator: of all randomness.
        fillers: kinds of filler, up to FILLERS: the fewer, the more alike is all that tells nothing.

    Raises:
        ValueError: more facts than keys, or than the tokens have room for.
    """
    if not 0 < facts <= min(KEYS, tokens // 2):
        raise ValueError(f"{facts} facts: expected 1 to {min(KEYS, tokens // 2)} in {tokens} tokens of {KEYS} keys")
    context = _FIRST_FILLER + torch.randint(fillers, (tokens,), generator=generator)
    # Places of facts among what is left when every fact has shrunk to one token.
    chosen = torch.randperm(tokens - facts, generator=generator)[:facts].sort().values
    places = chosen + torch.arange(facts)
    keys = torch.randperm(KEYS, generator=generator)[:facts]
    values = _FIRST_VALUE + torch.randint(VALUES, (facts,), generator=generator)
    context[places], context[places + 1] = keys, values
    return Facts(context, keys, values, places)


class Lesson(NamedTuple):
    """What a model is trained on.

    Attributes:
        ids: int64 [sequences, tokens]: a context, then facts of it again.
        positions: int64 [sequences, tokens], ascending, with gaps, so that short sequences teach long distances.
        targets: int64 [sequences, tokens]: the next token where it is a value that was told before, elsewhere -100.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor


def make_lesson(
    sequences: int, tokens: int, facts: int, questions: int, reach: int, generator: torch.Generator
) -> Lesson:
    """Lessons of one length.

    Args:
        sequences: how many.
        tokens: of a context, questions not counted.
        facts: of a context, from 2 to this.
        questions: asked after it, with their answers.
        reach: the largest position is about this.
        generator: of all randomness.
    """
    rows = [_lesson(tokens, facts, questions, reach, generator) for _ in range(sequences)]
    return Lesson(*(torch.stack([row[part] for row in rows]) for part in range(3)))


def _lesson(tokens: int, facts: int, questions: int, reach: int, generator: torch.Generator) -> Lesson:
    count = int(torch.randint(2, facts + 1, (), generator=generator))
    told = tell_facts(tokens, count, generator)
    asked = torch.randint(count, (questions,), generator=generator)
    ids = torch.cat([told.context, torch.stack([told.keys[asked], told.values[asked]], 1).reshape(-1)])
    targets = torch.full_like(ids, -100)
    targets[tokens::2] = told.values[asked]
    # A value follows its key everywhere: gaps are before keys and fillers only.
    steps = torch.ones_like(ids)
    may_jump = (ids < KEYS) | (ids >= _FIRST_FILLER)
    may_jump[0] = False
    gaps = torch.rand(len(ids), generator=generator).pow(8) * may_jump
    room = torch.rand((), generator=generator) * max(0, reach - len(ids))
    steps += (gaps / gaps.sum().clamp_min(1e-9) * room).long()
    return Lesson(ids, steps.cumsum(0) - 1, targets)
