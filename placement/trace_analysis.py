"""What a routing trace says of a model: how unequal experts are, how much tokens repeat, how often a cache hits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.routing import MeasuredHits, Popularity, inclusion
from placement.stack_distances import IntArray
from prefetch.traces.trace import RoutingTrace, TraceError

_MOST_SKEW = 4.0
_SOLVE_STEPS = 40
_MOST_LOCALITY = 0.95


@dataclass(frozen=True, eq=False)
class Requests:
    """The experts that passes need of a cache, in the order of execution.

    Attributes:
        keys: int64 [n], expert keys, ascending in each step.
        steps: int64 [passes x layers], where each layer of each pass begins.
        decode: bool [n], needed by a pass of decode.
        late: bool [n], needed in the second half of the passes of decode: the cache has seen most experts by then.
    """

    keys: IntArray
    steps: IntArray
    decode: npt.NDArray[np.bool_]
    late: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, trace: RoutingTrace) -> Requests:
        """Those of a trace."""
        first = trace.geometry.first_keys[:-1]
        keys: list[IntArray] = []
        sizes: list[IntArray] = []
        for index in range(trace.passes):
            start, end = trace.pass_starts[index : index + 2]
            if end - start == 1:
                taken = np.sort(trace.experts[start].astype(np.int64), axis=1) + first[:, None]
                keys.append(taken.reshape(-1))
                sizes.append(np.full(trace.geometry.layers, trace.top_k, dtype=np.int64))
            else:
                layers = [np.unique(trace.experts[start:end, layer]) for layer in range(trace.geometry.layers)]
                keys += [layer.astype(np.int64) + key for layer, key in zip(layers, first, strict=True)]
                sizes.append(np.array([len(layer) for layer in layers], dtype=np.int64))
        of_pass = np.array([size.sum() for size in sizes], dtype=np.int64)
        decode = ~trace.pass_prefill
        late = decode & (np.cumsum(decode) > decode.sum() // 2)
        flat = np.concatenate([*sizes, np.zeros(0, np.int64)])
        return cls(
            np.concatenate([*keys, np.zeros(0, np.int64)]),
            np.concatenate([[0], np.cumsum(flat)[:-1]]).astype(np.int64) if len(flat) else flat,
            np.repeat(decode, of_pass),
            np.repeat(late, of_pass),
        )


def expert_counts(trace: RoutingTrace) -> list[IntArray]:
    """By layer, int64 [experts]: tokens that went to each."""
    return [
        np.bincount(trace.experts[:, layer].reshape(-1), minlength=count).astype(np.int64)
        for layer, count in enumerate(trace.geometry.counts)
    ]


def decode_hits(trace: RoutingTrace) -> MeasuredHits:
    """The hit curve of decode with a least-recently-used cache, after the first half of the passes.

    Prefills pass through the cache as they did; a cache that holds every expert is filled when a model is loaded.

    Raises:
        TraceError: the trace has fewer than two passes of decode.
    """
    requests = Requests.of(trace)
    if (~trace.pass_prefill).sum() < 2:
        raise TraceError(f"{trace.name}: a hit rate needs two passes of decode or more; record a longer run")
    return MeasuredHits(requests.keys, requests.steps, requests.late, trace.geometry.total)


def fit_popularity(trace: RoutingTrace) -> Popularity:
    """The stated model of popularity that is most like the trace.

    The sum of squares of the experts' probabilities is estimated by products of their shares in either half of the
    tokens, which no sampling noise raises; skew is what gives that sum. Locality is the share of experts that the token
    before had too, beyond what such popularity gives by chance.

    Raises:
        TraceError: fewer than two tokens.
    """
    tokens = len(trace.experts)
    if tokens < 2:
        raise TraceError(f"{trace.name}: popularity needs two tokens or more; record a longer run")
    halves = np.array_split(np.arange(tokens), 2)
    squares = 0.0
    for layer, count in enumerate(trace.geometry.counts):
        shares = [np.bincount(trace.experts[half, layer].reshape(-1), minlength=count) / len(half) for half in halves]
        squares += float(shares[0] @ shares[1])
    skew = _skew_of(trace, squares)
    chance = sum(_squares(count, trace.top_k, skew) for count in trace.geometry.counts)
    beyond = (_repeated(trace) - chance / trace.top_k / trace.geometry.layers) / max(
        1e-9, 1 - chance / trace.top_k / trace.geometry.layers
    )
    return Popularity(skew, float(np.clip(beyond, 0.0, _MOST_LOCALITY)))


def _skew_of(trace: RoutingTrace, squares: float) -> float:
    low, high = 0.0, _MOST_SKEW
    for _ in range(_SOLVE_STEPS):
        middle = (low + high) / 2
        found = sum(_squares(count, trace.top_k, middle) for count in trace.geometry.counts)
        low, high = (middle, high) if found < squares else (low, middle)
    return low


def _squares(count: int, top_k: int, skew: float) -> float:
    chosen = np.minimum(inclusion(count, min(top_k, count), skew), 1.0)
    return float(chosen @ chosen)


def _repeated(trace: RoutingTrace) -> float:
    """Share of a token's experts that the token before had too, 0 to 1.

    Of passes of one token, one after another; where there are none, of neighbours in a pass.
    """
    starts = trace.pass_starts
    single = trace.pass_tokens == 1
    pairs = starts[1:-1][single[1:] & single[:-1]]
    if not len(pairs):
        inside = np.ones(len(trace.experts), dtype=bool)
        inside[starts[:-1]] = False
        pairs = np.flatnonzero(inside)
    if not len(pairs):
        return 0.0
    now, before = trace.experts[pairs], trace.experts[pairs - 1]
    same = (now[..., :, None] == before[..., None, :]).any(axis=-1)
    return float(same.mean())
