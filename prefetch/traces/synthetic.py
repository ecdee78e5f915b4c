"""Synthetic traces: routing drawn from a stated model of popularity and locality. No language model was run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prefetch.policies.geometry import Geometry
from prefetch.traces.trace import RoutingTrace


@dataclass(frozen=True)
class SyntheticRouting:
    """How tokens are drawn: in each layer, independently, the top_k of
    log popularity + topic + locality x (chosen by the token before) + Gumbel noise.

    Attributes:
        layers: MoE layers.
        experts: in each.
        top_k: of a token.
        skew: exponent s of the popularity 1 / rank^s; 0 is uniform. Ranks are shuffled by layer.
        locality: added to the logits of experts that the token before went to; 0 is none.
        topic: standard deviation of logits that stay for a topic's length; 0 is none.
        topic_tokens: tokens after which the topic changes.
        layer_copy: share of tokens, 0 to 1, that in each layer follow a fixed map from the layer before.
    """

    layers: int
    experts: int
    top_k: int
    skew: float = 0.4
    locality: float = 1.0
    topic: float = 0.5
    topic_tokens: int = 64
    layer_copy: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts or self.layers < 1 or self.topic_tokens < 1:
            raise ValueError(f"top {self.top_k} of {self.experts} experts in {self.layers} layers")

    @property
    def name(self) -> str:
        """Says that it is synthetic, and its parameters."""
        return (
            f"synthetic {self.layers}x{self.experts} top-{self.top_k}, skew {self.skew:g}, locality {self.locality:g}, "
            f"topic {self.topic:g}/{self.topic_tokens}, layer copy {self.layer_copy:g}"
        )


def draw(
    routing: SyntheticRouting, prompt_tokens: int, new_tokens: int, seed: int, *, batch: int = 1, chunk: int = 1 << 62
) -> RoutingTrace:
    """Sequences of one model: a prefill of `prompt_tokens` of each (none for 0), then passes of one token of each.

    Args:
        routing: how tokens are drawn.
        prompt_tokens: of each sequence.
        new_tokens: of each sequence.
        seed: decides all.
        batch: sequences.
        chunk: most tokens of a sequence in one pass of the prefill.
    """
    chance = np.random.default_rng(seed)
    length = prompt_tokens + new_tokens
    tokens = batch * length
    chosen = np.empty((tokens, routing.layers, routing.top_k), np.uint16)
    maps = [chance.permutation(routing.experts) for _ in range(routing.layers)]
    copies = chance.random((tokens, routing.layers)) < routing.layer_copy
    for layer in range(routing.layers):
        logits = _logits(routing, tokens, chance)
        bonus = np.zeros(routing.experts)
        for token in range(tokens):
            if token % length == 0:
                bonus[:] = 0.0
            if layer > 0 and copies[token, layer]:
                chosen[token, layer] = maps[layer][chosen[token, layer - 1]]
            else:
                chosen[token, layer] = np.argpartition(logits[token] + bonus, -routing.top_k)[-routing.top_k :]
            bonus[:] = 0.0
            bonus[chosen[token, layer]] = routing.locality
    # One sequence after another was drawn; a pass has the same tokens of each.
    starts = [*range(0, prompt_tokens, chunk), *range(prompt_tokens, length)]
    ends = [*starts[1:], length] if starts else []
    sequences = chosen.reshape(batch, length, routing.layers, routing.top_k)
    ordered = [
        sequences[:, start:end].reshape(-1, routing.layers, routing.top_k)
        for start, end in zip(starts, ends, strict=True)
    ]
    pass_tokens = np.array([batch * (end - start) for start, end in zip(starts, ends, strict=True)], np.int32)
    pass_prefill = np.array([end - start > 1 for start, end in zip(starts, ends, strict=True)], np.bool_)
    geometry = Geometry.uniform(routing.layers, routing.experts)
    experts = np.concatenate(ordered) if ordered else chosen
    return RoutingTrace(routing.name, geometry, routing.top_k, pass_tokens, pass_prefill, experts)


def _logits(routing: SyntheticRouting, tokens: int, chance: np.random.Generator) -> npt.NDArray[np.float64]:
    """[tokens, experts] of one layer, without locality."""
    ranks = 1 + chance.permutation(routing.experts)
    topics = -(-tokens // routing.topic_tokens)
    topic = np.repeat(routing.topic * chance.standard_normal((topics, routing.experts)), routing.topic_tokens, axis=0)
    noise = chance.gumbel(size=(tokens, routing.experts))
    logits: npt.NDArray[np.float64] = noise + topic[:tokens] - routing.skew * np.log(ranks)
    return logits
