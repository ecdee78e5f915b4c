"""Routing against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.moe.routing import Routing, route


def check(routing: Routing, ids: list[list[int]], weights: list[list[float]], experts: int, top_k: int) -> None:
    pairs: dict[int, list[int]] = {}
    dropped = []
    for token, (row_ids, row_weights) in enumerate(zip(ids, weights, strict=True)):
        for place, (expert, weight) in enumerate(zip(row_ids, row_weights, strict=True)):
            row = token * top_k + place
            if weight != 0 and 0 <= expert < experts:
                pairs.setdefault(expert, []).append(row)
            else:
                dropped.append(row)
    assert routing.experts == sorted(pairs)
    assert all(type(expert) is int for expert in routing.experts)
    assert routing.offsets.shape == (len(pairs) + 1,)
    for index, expert in enumerate(routing.experts):
        rows = routing.rows[routing.offsets[index] : routing.offsets[index + 1]].tolist()
        assert rows == pairs[expert]
    assert routing.tokens.tolist() == [row // top_k for row in routing.rows.tolist()]
    assert routing.offsets[-1] == routing.rows.size == routing.tokens.size == sum(map(len, pairs.values()))
    assert routing.dropped_rows.tolist() == dropped
    assert routing.weights.dtype is torch.float32
    expected = torch.tensor(weights, dtype=torch.float32).reshape(len(ids), top_k).reshape(-1)
    expected[dropped] = 0
    assert torch.equal(routing.weights, expected.view(len(ids), top_k))
    for array in (routing.offsets, routing.rows, routing.tokens, routing.dropped_rows):
        assert array.dtype == np.int64


@settings(deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda top_k: st.tuples(
            st.just(top_k),
            st.lists(
                st.lists(
                    st.tuples(st.integers(-2, 11), st.sampled_from([0.0, -0.0, 0.5, 1.0, -2.0, 1e-30])),
                    min_size=top_k,
                    max_size=top_k,
                ),
                max_size=30,
            ),
        )
    ),
    st.sampled_from([torch.int32, torch.int64]),
    st.booleans(),
)
def test_any_choice(choice: tuple[int, list[list[tuple[int, float]]]], dtype: torch.dtype, strided: bool) -> None:
    top_k, rows = choice
    ids = [[expert for expert, _ in row] for row in rows]
    weights = [[weight for _, weight in row] for row in rows]
    index = torch.tensor(ids, dtype=dtype).reshape(len(ids), top_k)
    scores = torch.tensor(weights, dtype=torch.float32).reshape(len(ids), top_k)
    if strided:
        index, scores = index.T.contiguous().T, torch.stack([scores, scores], dim=-1)[..., 0]
    before = index.clone(), scores.clone()
    check(route(index, scores, 9), ids, weights, 9, top_k)
    assert torch.equal(index, before[0])
    assert torch.equal(scores, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_types_are_read_as_fp32(dtype: torch.dtype) -> None:
    weights = torch.tensor([[0.3, 0.7], [1.0, 0.0]], dtype=dtype)
    routing = route(torch.tensor([[4, 1], [1, 3]]), weights, 5)
    assert torch.equal(routing.weights, weights.to(torch.float32))
    assert routing.experts == [1, 4]


def test_weights_that_ask_for_gradients_are_detached() -> None:
    weights = torch.ones(2, 1, requires_grad=True)
    assert not route(torch.tensor([[0], [1]]), weights, 2).weights.requires_grad


@pytest.mark.parametrize("numbers", [[], [0], [3], [0, 1, 2, 3], [3, 2, 1, 0], [1, 3], [2, 0], [2, 1, 3]], ids=str)
def test_selecting_some_experts(numbers: list[int]) -> None:
    routing = route(torch.tensor([[0, 3], [3, 5], [8, 3], [5, 0], [3, 9]]), torch.ones(5, 2), 9)
    assert routing.experts == [0, 3, 5, 8]
    offsets, pairs = routing.select(numbers)
    assert offsets.dtype == np.int64
    assert offsets[0] == 0
    assert len(offsets) == len(numbers) + 1
    rows = {0: [0, 7], 3: [1, 2, 5, 8], 5: [3, 6], 8: [4]}
    for place, number in enumerate(numbers):
        found = routing.rows[pairs][offsets[place] : offsets[place + 1]].tolist()
        assert found == rows[routing.experts[number]]
    assert routing.rows[pairs].size == offsets[-1]


def test_all_dropped() -> None:
    routing = route(torch.tensor([[7, 8]]), torch.ones(1, 2), 7)
    check(routing, [[7, 8]], [[1.0, 1.0]], 7, 2)
    assert routing.experts == []


def test_a_weight_that_is_not_a_number_is_not_hidden() -> None:
    routing = route(torch.tensor([[0, 1]]), torch.tensor([[float("nan"), 1.0]]), 2)
    assert routing.experts == [0, 1]
    assert routing.weights.isnan().tolist() == [[True, False]]
