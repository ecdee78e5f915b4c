"""Sums of expert outputs do not depend on the order in which experts come."""

from __future__ import annotations

import random

import pytest
import torch

from offload.moe.accumulate import (
    Accumulator,
    KeptAccumulator,
    OrderedAccumulator,
    PairAccumulator,
    make_accumulator,
)
from offload.moe.routing import Routing, route
from placement.outputs import ACCELERATED_PAIR_BUFFER_NBYTES, PAIR_BUFFER_NBYTES

HIDDEN = 9
EXPERTS = 7
# No token; one; one more than a power of two; a pair for each of many.
SHAPES = [(0, 3), (1, 1), (1, 4), (17, 3), (65, 2)]


def choose(tokens: int, top_k: int, *, dropped: bool) -> tuple[Routing, torch.Tensor]:
    """A routing, and the fp32 output of every pair, [T, k, H]."""
    generator = torch.Generator().manual_seed(tokens)
    weights, index = torch.rand(tokens, EXPERTS, generator=generator).topk(top_k, dim=-1)
    if dropped and tokens:
        weights[::3, 0] = 0
        index[1::4, -1] = EXPERTS
    return route(index, weights, EXPERTS), torch.randn(tokens, top_k, HIDDEN, generator=generator)


def feed(accumulator: Accumulator, routing: Routing, outputs: torch.Tensor, order: list[int]) -> torch.Tensor:
    flat = outputs.view(-1, HIDDEN)
    for index in order:
        _, pairs = routing.select([index])
        out, rows = accumulator.target(pairs)
        assert out.dtype is torch.float32
        assert out.is_contiguous()
        out[torch.from_numpy(rows)] = flat[torch.from_numpy(routing.rows[pairs])]
        accumulator.added(pairs)
    return accumulator.result()


def reference(routing: Routing, outputs: torch.Tensor) -> torch.Tensor:
    kept = (routing.weights != 0)[..., None]
    return torch.where(kept, routing.weights[..., None].double() * outputs.double(), 0.0).sum(dim=1)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [PairAccumulator, OrderedAccumulator, KeptAccumulator])
def test_the_weighted_sum(kind: type[Accumulator], shape: tuple[int, int], dropped: bool) -> None:
    routing, outputs = choose(*shape, dropped=dropped)
    result = feed(kind(routing, HIDDEN), routing, outputs, list(range(len(routing.experts))))  # type: ignore[call-arg]
    assert result.shape == (shape[0], HIDDEN)
    assert result.dtype is torch.float32
    assert torch.allclose(result.double(), reference(routing, outputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_pairs_come_in_any_order(shape: tuple[int, int], seed: int) -> None:
    routing, outputs = choose(*shape, dropped=True)
    order = list(range(len(routing.experts)))
    expected = feed(PairAccumulator(routing, HIDDEN), routing, outputs, order)
    random.Random(seed).shuffle(order)
    assert torch.equal(feed(PairAccumulator(routing, HIDDEN), routing, outputs, order), expected)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("adds", [False, True], ids=["target", "add"])
def test_what_comes_in_order_and_is_kept_has_the_bits_of_pairs(dropped: bool, adds: bool) -> None:
    routing, outputs = choose(17, 3, dropped=dropped)
    order = list(range(len(routing.experts)))
    expected = feed(PairAccumulator(routing, HIDDEN), routing, outputs, order)
    kept = KeptAccumulator(routing, HIDDEN)
    if not adds:
        assert torch.equal(feed(kept, routing, outputs, order), expected)
        return
    for number in order:
        _, pairs = routing.select([number])
        kept.add(pairs, outputs.view(-1, HIDDEN)[torch.from_numpy(routing.rows[pairs])])
    assert torch.equal(kept.result(), expected)


@pytest.mark.parametrize("kind", [OrderedAccumulator, KeptAccumulator])
def test_the_ordered_sum_refuses_another_order(kind: type[OrderedAccumulator]) -> None:
    routing, outputs = choose(17, 3, dropped=False)
    with pytest.raises(RuntimeError, match="out of order: pair 0 "):
        feed(kind(routing, HIDDEN), routing, outputs, [1, 0])
    accumulator = kind(routing, HIDDEN)
    feed(accumulator, routing, outputs, [0])
    with pytest.raises(RuntimeError, match="out of order: pair"):
        feed(accumulator, routing, outputs, [0])


def test_the_way_depends_on_shapes_alone() -> None:
    few, _ = choose(17, 3, dropped=True)
    for accelerated, nbytes in ((False, PAIR_BUFFER_NBYTES), (True, ACCELERATED_PAIR_BUFFER_NBYTES)):
        limit = nbytes // (17 * 3 * 4)
        assert isinstance(make_accumulator(few, limit, accelerated=accelerated), PairAccumulator)
        assert isinstance(make_accumulator(few, limit + 1, accelerated=accelerated), OrderedAccumulator)
    between = (PAIR_BUFFER_NBYTES + ACCELERATED_PAIR_BUFFER_NBYTES) // 2 // (17 * 3 * 4)
    assert type(make_accumulator(few, between)) is PairAccumulator
    assert type(make_accumulator(few, between, accelerated=True)) is KeptAccumulator
    assert PairAccumulator.ordered is False
    assert OrderedAccumulator.ordered is True
