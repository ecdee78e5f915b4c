"""How much of what a context told a model recalls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from examples.tiny_recall.task import Facts

CHUNK_TOKENS = 1024


class Recalled(NamedTuple):
    """Answers to questions after contexts.

    Attributes:
        right: bool [facts], whether a key's value is what the model finds likeliest after it.
        depths: [facts], where the fact is: 0 is the start of the context, 1 its end.
    """

    right: torch.Tensor
    depths: torch.Tensor

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.float().mean())

    def by_depth(self, parts: int) -> list[float]:
        """Share of right answers in each of so many equal parts of the context, the first one first."""
        part = (self.depths * parts).long().clamp_max(parts - 1)
        return [float(self.right[part == one].float().mean()) for one in range(parts)]


@torch.no_grad()
def recall(model: PreTrainedModel, facts: Facts) -> Recalled:
    """Read a context once, then ask for every fact in turn, each time as if it was the first.

    Args:
        model: made by `examples.tiny_recall.train`, loaded by whatever library.
        facts: the context, and what it tells.
    """
    cache = DynamicCache(config=model.config)
    for chunk in facts.context[None].split(CHUNK_TOKENS, dim=1):
        model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    right = torch.zeros(len(facts.keys), dtype=torch.bool)
    for number, (key, value) in enumerate(zip(facts.keys, facts.values, strict=True)):
        logits = model(key.reshape(1, 1), past_key_values=cache, use_cache=True).logits
        right[number] = logits[0, -1].argmax() == value
        cache.crop(-1)
    return Recalled(right, facts.places / len(facts.context))


def recall_all(model: PreTrainedModel, contexts: Sequence[Facts]) -> Recalled:
    """`recall` for several contexts, one after the other."""
    found = [recall(model, facts) for facts in contexts]
    return Recalled(torch.cat([one.right for one in found]), torch.cat([one.depths for one in found]))
