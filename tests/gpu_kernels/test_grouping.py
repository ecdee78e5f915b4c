"""Pairs grouped on the device against a loop over pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_kernels.grouping import FEW_PAIRS, PairGroups, group_pairs
from gpu_kernels.grouping_reference import group_pairs_reference


def tiles_of(groups: PairGroups) -> list[tuple[int, list[int]]]:
    order, (experts, firsts, ends) = groups.order.tolist(), groups.tiles.tolist()
    return [
        (expert, order[first : min(first + groups.block_tokens, end)])
        for expert, first, end in zip(experts, firsts, ends, strict=True)
        if expert >= 0
    ]


def assert_grouped(ids: torch.Tensor, here: list[bool], block_tokens: int, device: torch.device) -> None:
    table = torch.tensor([64 if known else 0 for known in here], dtype=torch.int64, device=device)
    groups = group_pairs(ids.to(device), table, block_tokens)
    assert tiles_of(groups) == group_pairs_reference(ids.view(-1).tolist(), here, block_tokens)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_few_pairs(device: torch.device, data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, 4))
    tokens = data.draw(st.integers(1, 10))
    ids = data.draw(st.lists(st.integers(-1, experts), min_size=tokens * top_k, max_size=tokens * top_k))
    here = data.draw(st.lists(st.booleans(), min_size=experts, max_size=experts))
    assert_grouped(torch.tensor(ids).view(tokens, top_k), here, data.draw(st.sampled_from((2, 16))), device)


@pytest.mark.parametrize("pairs", [FEW_PAIRS - 1, FEW_PAIRS])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_most_that_one_program_takes(pairs: int, dtype: torch.dtype, device: torch.device) -> None:
    ids = torch.randint(0, 5, (pairs, 1), generator=torch.Generator().manual_seed(pairs), dtype=dtype)
    assert_grouped(ids, [True, True, False, True, True], 16, device)


@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(129, 1, 3), (64, 8, 7), (1030, 2, 4), (80, 4, 1)],
    ids=["one more than few", "a block less", "past a block", "one expert"],
)
def test_many_pairs(tokens: int, top_k: int, experts: int, block_tokens: int, device: torch.device) -> None:
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(tokens))
    here = [expert != 1 for expert in range(experts)]
    assert_grouped(ids, here, block_tokens, device)


def test_all_pairs_of_many_on_the_last_expert(device: torch.device) -> None:
    assert_grouped(torch.full((200, 1), 5), [True] * 6, 16, device)


def test_no_pairs_at_all(device: torch.device) -> None:
    assert_grouped(torch.empty(0, 2, dtype=torch.int64), [True], 16, device)
    assert_grouped(torch.full((3, 2), -1), [True], 16, device)
    assert_grouped(torch.full((200, 2), 9), [True, False], 16, device)


@pytest.mark.parametrize(
    ("ids", "table"),
    [
        (torch.zeros(4, dtype=torch.int64), torch.ones(2, dtype=torch.int64)),
        (torch.zeros(4, 2), torch.ones(2, dtype=torch.int64)),
        (torch.zeros(2, 4, dtype=torch.int64).T, torch.ones(2, dtype=torch.int64)),
        (torch.zeros(4, 2, dtype=torch.int64), torch.ones(2, dtype=torch.int32)),
        (torch.zeros(4, 2, dtype=torch.int64), torch.ones(0, dtype=torch.int64)),
    ],
)
def test_what_does_not_fit_is_refused(ids: torch.Tensor, table: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected"):
        group_pairs(ids, table, 16)
