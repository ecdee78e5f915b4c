# mypy: allow-untyped-calls
"""Several predictors' words on one layer, combined by a logistic regression that learns from what came."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefetch.jit import entry, inner
from prefetch.predictors.logistic_kernel import choose, learn

# What is known of each expert of a layer to come. The bias moves no probability, since all log-odds are shifted alike;
# it makes Newton's steps those of the other inputs less their means.
BIAS, ROUTER, TRANSITION, PREVIOUS, POPULAR, EXPECTED, INPUTS = range(7)

# Rows of the counts that `score` adds to: correct among the k most probable, by predictor, those among the 2 k most
# probable of all together, and k in all.
BY_ROUTER, BY_TRANSITION, BY_PREVIOUS, COMBINED, COMBINED_TWICE, ROWS = range(6)

_FLOOR = 0.01
"""Of what was counted over tens of tokens."""

_LEAST = 0.001
"""Of what a policy expects."""


@inner
def _log_odds(share: float, least: float) -> Any:
    kept = min(max(share, least), 1.0 - least)
    return np.log(kept / (1.0 - kept))


@inner
def _edge_of(logits: Any, top_k: int) -> Any:
    """Half way between the last expert that would be picked and the first that would not."""
    ordered = np.sort(logits)
    edge = ordered[len(logits) - top_k]
    if top_k < len(logits):
        edge = 0.5 * (edge + ordered[len(logits) - top_k - 1])
    return edge


@inner
def _predict_one(
    row: int, layer: int, top_k: int, start: int, logits: Any, expected: Any, active: Any, uses: Any, weights: Any,
    offsets: Any, inputs: Any, said: Any, probabilities: Any, transitions: Any, sources: Any,
) -> None:  # fmt: skip
    experts = len(logits)
    corrected = logits + offsets[row, :experts]
    spread, edge = max(np.std(corrected), 1e-6), _edge_of(corrected, top_k)
    previous, popular = uses[layer], uses[len(uses) // 2 + layer]
    follows = np.zeros(experts)
    for one in active:
        for expert in range(experts):
            follows[expert] += transitions[start + one * experts + expert]
    for expert in range(experts):
        known = inputs[row, expert]
        known[BIAS] = 1.0
        known[ROUTER] = min(max((corrected[expert] - edge) / spread, -4.0), 4.0)
        known[TRANSITION] = _log_odds(follows[expert] / max(len(active), 1), _FLOOR)
        known[PREVIOUS] = previous[expert]
        known[POPULAR] = _log_odds(popular[expert], _FLOOR)
        known[EXPECTED] = _log_odds(expected[expert], _LEAST)
        logit = 0.0
        for place in range(INPUTS):
            known[place] *= sources[place]
            logit += weights[row, place] * known[place]
        said[row, expert] = logits[expert]
        probabilities[row, expert] = logit
    choose(probabilities[row, :experts], top_k)


@entry(
    "void(int64, int64, int64, int64[::1], int64[::1], float64[:, ::1], float64[:, ::1], int64[::1], int64[::1], "
    "float64[:, ::1], float64[:, ::1], float64[:, ::1], float64[:, :, ::1], float64[:, ::1], float64[:, ::1], "
    "float32[::1], int64[::1], float64[::1])"
)
def predict(
    layer: int, first: int, end: int, counts: Any, top_k: Any, logits: Any, expected: Any, active: Any, starts: Any,
    uses: Any, weights: Any, offsets: Any, inputs: Any, said: Any, probabilities: Any, transitions: Any, made: Any,
    sources: Any,
) -> None:  # fmt: skip
    """How probably each expert of some layers to come is needed.

    Args:
        layer: at which the token is.
        first: layers ahead of the first that is predicted.
        end: layers ahead before which to end.
        counts: int64 [layers], experts of each.
        top_k: int64 [layers], experts of a token in each, at most as many as it has.
        logits: float64 [end - first, most experts], what each layer's router says of this layer's hidden state.
        expected: float64 [end - first, most experts], how probably each is needed as the cache policy has it; 0.5
            where it says nothing.
        active: int64 [n], experts of this layer that the token goes to.
        starts: int64 [rows], of each row's transitions; a row is of a layer and of its distance.
        uses: float64 [2 x layers, most experts]: 1 where the token before needed an expert, then decayed shares of
            tokens that needed it.
        weights: float64 [rows, INPUTS].
        offsets: float64 [rows, most experts], added to logits.
        inputs: float64 [rows, most experts, INPUTS], filled: kept for `observe`, as are the next two.
        said: float64 [rows, most experts], filled with logits.
        probabilities: float64 [rows, most experts], filled.
        transitions: float32, each row's [experts of the earlier layer, experts]: decayed shares of tokens at which the
            first led to the second.
        made: int64 [rows]; 1 from now on.
        sources: float64 [INPUTS], 1 for what is gone by and 0 for what is not; the bias always is.
    """
    depth = len(made) // len(counts)
    for ahead in range(first, end):
        target = layer + ahead
        row = target * depth + ahead - 1
        _predict_one(
            row, target, top_k[target], starts[row], logits[ahead - first, : counts[target]],
            expected[ahead - first, : counts[target]], active, uses, weights, offsets, inputs, said, probabilities,
            transitions, sources,
        )  # fmt: skip
        made[row] = 1


@inner
def _correct(values: Any, used: Any, k: int) -> Any:
    order = np.argsort(-values)
    return np.sum(used[order[:k]])


@inner
def _score(inputs: Any, probabilities: Any, used: Any, counts: Any) -> None:
    """Count what was right; k is the number of experts that were needed."""
    k = int(np.sum(used))
    counts[BY_ROUTER] += _correct(inputs[:, ROUTER], used, k)
    counts[BY_TRANSITION] += _correct(inputs[:, TRANSITION], used, k)
    counts[BY_PREVIOUS] += _correct(inputs[:, PREVIOUS] + 0.01 * inputs[:, POPULAR], used, k)
    counts[COMBINED] += _correct(probabilities, used, k)
    counts[COMBINED_TWICE] += _correct(probabilities, used, min(2 * k, len(used)))
    counts[ROWS] += k


# Rates of `observe`: the decay of what weights rest on, the rate of offsets, the decay of transitions and popularity.
CURVATURE_DECAY, OFFSET_RATE, DECAY, RATES = range(4)


@entry(
    "void(int64, int64, boolean, int64[::1], float64[::1], int64[::1], float64[:, ::1], float64[:, ::1], "
    "float64[:, :, ::1], float64[:, ::1], float64[:, :, ::1], float64[:, ::1], float64[:, ::1], float32[::1], "
    "int64[::1], int64[:, ::1], float64[:, ::1], int64[::1], float64[::1])"
)
def observe(
    layer: int, experts: int, scored: bool, needed: Any, logits: Any, starts: Any, uses: Any, weights: Any,
    curvature: Any, offsets: Any, inputs: Any, said: Any, probabilities: Any, transitions: Any, made: Any, active: Any,
    counts: Any, used: Any, rates: Any,
) -> None:  # fmt: skip
    """A layer came: learn from it.

    Args:
        layer: which.
        experts: of it.
        scored: whether to count what was right.
        needed: int64 [n], the experts that it needed.
        logits: float64 [experts], what its router said; of no elements where that is not known.
        starts: int64 [rows], of each row's transitions.
        uses: see `predict`; updated, and so is what follows up to `made`.
        weights: see `predict`; updated.
        curvature: float64 [rows, INPUTS, INPUTS], see `learn`; updated.
        offsets: see `predict`; updated.
        inputs: see `predict`.
        said: see `predict`.
        probabilities: see `predict`.
        transitions: see `predict`.
        made: see `predict`; 0 from now on.
        active: int64 [layers, most experts], what each layer needed last; updated.
        counts: float64 [rows, ROWS + 1]; added to where `scored`.
        used: int64 [layers], how many experts of `active` count; updated.
        rates: float64 [RATES].
    """
    depth, layers = len(weights) // len(used), len(used)
    now = np.zeros(experts)
    for expert in needed:
        now[expert] = 1.0
    for ahead in range(1, depth + 1):
        row = layer * depth + ahead - 1
        if made[row]:
            made[row] = 0
            if len(logits):
                for expert in range(experts):
                    error = logits[expert] - said[row, expert] - offsets[row, expert]
                    offsets[row, expert] += rates[OFFSET_RATE] * error
            learn(
                inputs[row, :experts], probabilities[row, :experts], now, rates[CURVATURE_DECAY], curvature[row],
                weights[row],
            )  # fmt: skip
            if scored:
                _score(inputs[row, :experts], probabilities[row, :experts], now, counts[row])
        if layer >= ahead:
            kept = np.float32(rates[DECAY])
            for one in active[layer - ahead, : used[layer - ahead]]:
                start = starts[row] + one * experts
                for expert in range(experts):
                    moved = kept * transitions[start + expert] + (np.float32(1) - kept) * np.float32(now[expert])
                    transitions[start + expert] = moved
    used[layer] = len(needed)
    for place in range(len(needed)):
        active[layer, place] = needed[place]
    for expert in range(experts):
        uses[layer, expert] = now[expert]
        uses[layers + layer, expert] += (1.0 - rates[DECAY]) * (now[expert] - uses[layers + layer, expert])
