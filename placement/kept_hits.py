"""The hit rate of a cache that keeps what is most probably needed again, as the default policy does.

Of a popularity (see `routing`), each expert is in one of two states: the layer's last pass needed it or did not, which
makes the next need more probable or less. A cache that keeps what is most probably needed holds states in the order of
that probability, as far as its slots go; what it holds is found as often as they are needed. That is the best that can
be done where passes are drawn independently ("A0" of Aho, Denning and Ullman, "Principles of optimal page replacement",
1971). The experts that a layer just read take slots too, worth keeping or not: `PASSING` of a layer's needs where a
pass is one token of each sequence, and all of them in prompts, whose layers need most experts at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from placement.routing import FloatArray, Popularity, inclusion, pass_probabilities

PASSING = 0.7
"""Measured: replays of the forecast policy on drawn passes, skew 0 to 1, locality 0 to 0.3, 1 and 4 sequences."""


class KeptHits:
    """The hit rate that follows from a popularity, once the policy has seen many passes of the same kind."""

    def __init__(
        self, layers: Sequence[tuple[int, int]], popularity: Popularity, batch: int = 1, tokens: int | None = None
    ) -> None:
        """Order the states.

        Args:
            layers: (experts, top_k) of each MoE layer.
            popularity: of the experts.
            batch: sequences, of which each pass has one token.
            tokens: of passes of prompts; None for those of decode.
        """
        kinds: dict[tuple[int, int], int] = {}
        for layer in layers:
            kinds[layer] = kinds.get(layer, 0) + 1
        self.experts = sum(count * times for (count, _), times in kinds.items())
        shares, needs = [], []
        for (count, top_k), times in kinds.items():
            if tokens is None:
                share, need = _states(count, top_k, popularity, batch)
            else:
                need = np.array(pass_probabilities(count, top_k, tokens, popularity))
                share = np.ones(count)
            shares.append(times * share)
            needs.append(need)
        share, need = np.concatenate(shares), np.concatenate(needs)
        order = np.argsort(-need, kind="stable")
        self._slots = np.concatenate([[0.0], np.cumsum(share[order])])
        found = np.concatenate([[0.0], np.cumsum((share * need)[order])])
        self._found = found / found[-1]
        self._passing = (PASSING if tokens is None else 1.0) * found[-1] / len(layers)
        # A prompt's layer has all its experts when it ends: the slots that are left are of the other layers.
        self._others = 1.0 if tokens is None or len(layers) == 1 else len(layers) / (len(layers) - 1)

    def rate(self, slots: FloatArray) -> FloatArray:
        """See `HitCurve`."""
        slots = np.asarray(slots, dtype=np.float64)
        kept = np.interp(self._others * (slots - self._passing), self._slots, self._found)
        return np.where(slots >= self.experts, 1.0, np.minimum(kept, 1.0))


def _states(count: int, top_k: int, popularity: Popularity, batch: int) -> tuple[FloatArray, FloatArray]:
    """[2 x count] each: how often an expert is in a state, and how probably the next pass then needs it."""
    needed = np.array(pass_probabilities(count, top_k, batch, popularity))
    alone = np.minimum(inclusion(count, min(top_k, count), popularity.skew), 1.0)
    fresh = (1 - popularity.locality) * alone
    unasked = (1 - fresh) ** (batch - 1)
    after_need = 1 - unasked * (1 - popularity.locality - fresh)
    after_none = 1 - unasked * (1 - fresh)
    # Several sequences may have needed it: what the two states say together is brought to what is known of both.
    scale = needed / np.maximum(needed * after_need + (1 - needed) * after_none, 1e-300)
    share = np.concatenate([needed, 1 - needed])
    return share, np.minimum(np.concatenate([after_need, after_none]) * np.concatenate([scale, scale]), 1.0)


@lru_cache(maxsize=256)
def kept_hits(
    layers: tuple[tuple[int, int], ...], popularity: Popularity, batch: int, tokens: int | None = None
) -> KeptHits:
    """A `KeptHits`, made once."""
    return KeptHits(layers, popularity, batch, tokens)
