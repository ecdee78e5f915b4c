"""Traces survive their file format, damage is seen, and replay counts what a tier would."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.policies.geometry import Geometry
from prefetch.policies.lru import LruPolicy
from prefetch.policies.named import make_policy
from prefetch.policies.names import POLICIES
from prefetch.predictors.predictor import Predictor
from prefetch.traces import codec
from prefetch.traces.replay import belady_for, keys_of, replay
from prefetch.traces.stall import Pace, replay_stalls
from prefetch.traces.synthetic import SyntheticRouting, draw
from prefetch.traces.trace import RoutingTrace, TraceError


def make_trace(seed: int, counts: tuple[int, ...], top_k: int, scores: bool, depth: int = 0) -> RoutingTrace:
    chance = np.random.default_rng(seed)
    pass_tokens = chance.integers(1, 6, chance.integers(0, 8)).astype(np.int32)
    experts = np.empty((int(pass_tokens.sum()), len(counts), top_k), np.uint16)
    for token in range(len(experts)):
        for layer, count in enumerate(counts):
            experts[token, layer] = chance.permutation(count)[:top_k]
    shape = (len(pass_tokens), len(counts), max(counts))
    return RoutingTrace(
        "a model, a text",
        Geometry(counts),
        top_k,
        pass_tokens,
        pass_tokens > 1,
        experts,
        chance.random(shape).astype(np.float16) if scores else None,
        chance.standard_normal((*shape[:2], depth, shape[2])).astype(np.float16) if depth else None,
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    counts=st.lists(st.integers(3, 300), min_size=1, max_size=4).map(tuple),
    top_k=st.integers(1, 3),
    scores=st.booleans(),
    depth=st.integers(0, 2),
)
def test_what_is_encoded_is_decoded(seed: int, counts: tuple[int, ...], top_k: int, scores: bool, depth: int) -> None:
    trace = make_trace(seed, counts, top_k, scores, depth)
    found = codec.decode(codec.encode(trace))
    assert (found.name, found.geometry, found.top_k) == (trace.name, trace.geometry, trace.top_k)
    for name in ("pass_tokens", "pass_prefill", "experts"):
        assert np.array_equal(getattr(found, name), getattr(trace, name))
        assert getattr(found, name).dtype == getattr(trace, name).dtype
    for name in ("scores", "ahead"):
        one, other = getattr(found, name), getattr(trace, name)
        assert (one is None) == (other is None)
        assert other is None or (np.array_equal(one, other) and one.dtype == other.dtype)


def test_version_1_had_no_logits_ahead_and_is_read() -> None:
    trace = make_trace(3, (4, 7), 2, True)
    data = codec.encode(trace)
    magic, _, zero, nbytes, _ = codec._PREFIX.unpack_from(data)
    body = data[codec._PREFIX.size :]
    header = body[:nbytes].replace(b', "depth": 0', b"")
    assert len(header) < nbytes
    body = header + body[nbytes:]
    found = codec.decode(codec._PREFIX.pack(magic, 1, zero, len(header), zlib.crc32(body)) + body)
    assert np.array_equal(found.experts, trace.experts)
    assert np.array_equal(found.scores, trace.scores)
    assert found.ahead is None


def test_any_damage_is_seen() -> None:
    data = codec.encode(make_trace(3, (4, 7), 2, True))
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        if place in (10, 11):  # reserved
            continue
        with pytest.raises(TraceError):
            codec.decode(bytes(damaged))
    for cut in (0, 7, 19, len(data) - 1):
        with pytest.raises(TraceError):
            codec.decode(data[:cut])


def test_a_header_that_lies_is_refused() -> None:
    data = codec.encode(make_trace(3, (4, 7), 2, False))
    magic, version, zero, nbytes, _ = codec._PREFIX.unpack_from(data)
    header, arrays = data[codec._PREFIX.size :][:nbytes], data[codec._PREFIX.size + nbytes :]
    for old, new in ((b'"top_k": 2', b'"top_k": 3'), (b'"counts"', b'"county"'), (b'"passes": ', b'"passes":-')):
        assert old in header
        body = header.replace(old, new) + arrays
        with pytest.raises(TraceError, match="header does not fit"):
            codec.decode(codec._PREFIX.pack(magic, version, zero, nbytes, zlib.crc32(body)) + body)
    with pytest.raises(TraceError, match="version 9"):
        codec.decode(codec._PREFIX.pack(magic, 9, zero, nbytes, 0) + data[codec._PREFIX.size :])


@pytest.mark.parametrize("wrong", ["shape", "range", "twice", "empty pass", "ahead"])
def test_a_trace_that_contradicts_itself_is_refused(wrong: str) -> None:
    experts = np.array([[[0, 1]], [[2, 1]]], np.uint16)
    tokens = np.array([2], np.int32)
    if wrong == "shape":
        tokens = np.array([3], np.int32)
    elif wrong == "range":
        experts[0, 0, 0] = 9
    elif wrong == "twice":
        experts[0, 0, 0] = 1
    elif wrong == "ahead":
        with pytest.raises(TraceError, match="logits ahead"):
            RoutingTrace("", Geometry((3,)), 2, tokens, tokens > 1, experts, None, np.zeros((1, 1, 2, 4), np.float16))
        return
    else:
        tokens = np.array([2, 0], np.int32)
    with pytest.raises(TraceError):
        RoutingTrace("", Geometry((3,)), 2, tokens, tokens > 1, experts)


def test_steps_group_tokens_by_expert() -> None:
    experts = np.array([[[0, 1], [2, 3]], [[1, 2], [2, 0]], [[2, 1], [1, 0]]], np.uint16)
    trace = RoutingTrace("", Geometry((3, 4)), 2, np.array([2, 1], np.int32), np.array([True, False]), experts)
    steps = list(trace.steps())
    assert [keys_of(trace, step) for step in steps] == [[0, 1, 2], [3, 5, 6], [1, 2], [3, 4]]
    assert steps[0].loads.tolist() == [1, 2, 1]
    assert steps[0].shares == [0.5, 1.0, 0.5]
    assert steps[2].shares is None


def test_lru_replay_against_a_list() -> None:
    trace = draw(SyntheticRouting(3, 8, 2), 0, 200, seed=4)
    recent: list[int] = []
    misses = 0
    for step in trace.steps():
        keys = keys_of(trace, step)
        misses += len(set(keys) - set(recent))
        recent = [key for key in recent if key not in keys]
        # Hits are touched when the layer is routed, misses come in after.
        recent += keys
        del recent[:-9]
    found = replay(trace, LruPolicy(), 9)
    assert found.decode_misses == pytest.approx(misses, rel=0.02)
    assert found.prefill_hits == found.prefill_misses == 0
    assert found.decode_hits + found.decode_misses == 3 * 2 * 200


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("slots", [1, 3, 9, 24])
def test_no_policy_beats_belady(name: str, slots: int) -> None:
    trace = draw(SyntheticRouting(3, 8, 2, skew=0.6), 12, 80, seed=slots)
    least, found = replay(trace, belady_for(trace), slots), replay(trace, make_policy(name, trace.geometry), slots)
    assert found.decode_hits + found.decode_misses == least.decode_hits + least.decode_misses
    assert found.misses >= least.misses
    if slots == 24:
        assert found.misses == least.misses <= 24


def test_synthetic_parameters_do_what_they_say() -> None:
    def repeated(routing: SyntheticRouting) -> float:
        chosen = draw(routing, 0, 300, seed=1).experts
        return float(np.mean([len(set(a) & set(b)) for a, b in zip(chosen[1:, 1], chosen[:-1, 1], strict=True)]))

    plain = SyntheticRouting(2, 16, 4, skew=0.0, locality=0.0, topic=0.0)
    assert repeated(plain) == pytest.approx(1.0, abs=0.15)  # 4 x 4 / 16
    assert repeated(SyntheticRouting(2, 16, 4, skew=0.0, locality=2.0, topic=0.0)) > 1.7
    skewed = draw(SyntheticRouting(2, 16, 4, skew=1.5, locality=0.0, topic=0.0), 0, 300, seed=1).experts
    counts = np.sort(np.bincount(skewed[:, 0].ravel(), minlength=16))
    assert counts[-1] > 5 * counts[0]
    copied = draw(SyntheticRouting(2, 16, 4, layer_copy=1.0), 0, 50, seed=1).experts
    pairs = {tuple(pair) for token in copied for pair in zip(token[0], token[1], strict=True)}
    assert len(pairs) == len({first for first, _ in pairs}), "the same expert led to two"
    assert "synthetic" in plain.name
    with pytest.raises(ValueError, match="top 5 of 4"):
        SyntheticRouting(1, 4, 5)


def told(trace: RoutingTrace, depth: int, noise: float) -> RoutingTrace:
    """The trace with what routers ahead would say if they saw what is chosen, and noise."""
    chance = np.random.default_rng(0)
    passes, layers, widest = trace.passes, trace.geometry.layers, max(trace.geometry.counts)
    ahead = np.zeros((passes, layers, depth, widest), np.float16)
    for index in range(passes):
        for layer in range(layers):
            for distance in range(1, min(depth, layers - 1 - layer) + 1):
                logits = noise * chance.standard_normal(widest)
                logits[trace.step(index, layer + distance).experts] += 2.0
                ahead[index, layer, distance - 1] = logits
    return replace(trace, ahead=ahead)


def test_a_replay_tells_the_policy_of_layers_to_come() -> None:
    trace = draw(SyntheticRouting(8, 8, 2, skew=0.1, locality=0.2, topic=0.0), 0, 100, seed=2)
    geometry = trace.geometry
    alone = replay(trace, make_policy("forecast", geometry), 16)
    sure = told(trace, 3, 0.1)
    predictor = Predictor(geometry, 3)
    found = replay(sure, make_policy("forecast", geometry), 16, predictor=predictor)
    assert found != alone
    assert found.decode_hits + found.decode_misses == alone.decode_hits + alone.decode_misses
    assert replay(trace, belady_for(trace), 16).misses <= found.misses
    assert min(skill.router for skill in predictor.skills()) > 0.95
    with pytest.raises(ValueError, match="no logits"):
        replay(trace, make_policy("lru", geometry), 16, predictor=predictor)


def test_stalls_by_hand() -> None:
    """Two layers, one expert a token, never the same: every expert is read."""
    experts = np.array([[[0], [0]], [[1], [1]]], np.uint16)
    trace = RoutingTrace("", Geometry((2, 2)), 1, np.ones(2, np.int32), np.zeros(2, np.bool_), experts)
    pace = Pace(read_s=5.0, experts_s=1.0, between_s=2.0)
    alone = replay_stalls(trace, LruPolicy(), 4, pace, oracle_layers=0)
    # Each layer waits 5 s for its read and computes it in 1 s.
    assert (alone.stall_s, alone.seconds, alone.reads, alone.tokens) == (20.0, 4 * (5 + 1 + 2), 4, 2)
    known = replay_stalls(trace, LruPolicy(), 4, pace, oracle_layers=1)
    # The next layer's read follows at once: it has 5 + 1 + 2 - 5 = 3 s before its layer comes, of 5.
    assert known.stall_s == 5.0 + 3 * 2.0
    assert known.reads == 4
    whole = replay_stalls(trace, LruPolicy(), 4, Pace(0.0, 1.0, 2.0), oracle_layers=1, warm_passes=1)
    assert (whole.stall_s, whole.seconds, whole.reads, whole.tokens) == (0.0, 6.0, 1, 1)
