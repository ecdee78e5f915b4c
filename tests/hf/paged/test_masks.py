"""Which masks are causal attention with padding."""

from __future__ import annotations

import pytest
import torch

from offload.hf.paged.masks import padding_of
from tests.kv.allocations import measured


def _causal(valid: torch.Tensor, new: int) -> torch.Tensor:
    tokens = valid.shape[1]
    return (torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new) & valid[:, None])[:, None]


def _additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("new", [1, 2, 150])
@pytest.mark.parametrize("additive", [False, True])
def test_padding_is_found(new: int, additive: bool) -> None:
    valid = torch.ones(2, 200, dtype=torch.bool)
    valid[1, :60] = False
    mask = _causal(valid, new)
    found = padding_of(_additive(mask) if additive else mask, 200 - new, new)
    assert found is not None and not found.all_valid
    assert torch.equal(torch.from_numpy(found.valid), valid)


def test_no_mask_is_no_padding() -> None:
    found = padding_of(None, 5, 1)
    assert found is not None and found.all_valid


def test_one_new_token_may_see_any_of_them() -> None:
    mask = torch.rand(2, 1, 1, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    found = padding_of(mask, 29, 1)
    assert found is not None and torch.equal(torch.from_numpy(found.valid), mask[:, 0, 0])


@pytest.mark.parametrize("what", ["window", "bidirectional", "bias", "heads", "length"])
def test_other_masks_are_not_taken(what: str) -> None:
    mask = _causal(torch.ones(1, 20, dtype=torch.bool), 6)
    if what == "window":
        mask = mask & torch.ones(6, 20, dtype=torch.bool).triu(10)
    elif what == "bidirectional":
        mask[:, :, 2, 19] = True
    elif what == "bias":
        mask = _additive(mask)
        mask[0, 0, 3, 4] = -0.5
    elif what == "heads":
        mask = mask.expand(1, 2, 6, 20)
    else:
        mask = mask[..., 1:]
    assert padding_of(mask, 14, 6) is None


def test_another_mask_is_not_taken_for_the_one_before() -> None:
    for valid_from in (0, 3, 5):
        valid = torch.arange(9)[None] >= valid_from
        mask = _causal(valid, 2)
        found = padding_of(mask, 7, 2)
        assert found is not None and torch.equal(torch.from_numpy(found.valid), valid)
        del mask


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("additive", [False, True])
def test_a_step_of_decode_copies_no_mask(new: int, additive: bool) -> None:
    """Nothing that grows with the history: what is made of a long mask lies in memory that is kept."""
    steps = []
    for tokens in (5000, 40000):
        valid = torch.ones(2, tokens, dtype=torch.bool)
        valid[1, :60] = False
        causal = _causal(valid, new)
        masks = [_additive(causal) if additive else causal.clone() for _ in range(9)]
        coming = iter(masks)
        padding_of(next(coming), tokens - new, new)
        steps.append(measured(lambda: padding_of(next(coming), tokens - new, new)))  # noqa: B023
    short, long = steps
    # A number of each thread.
    assert long.tensors - short.tensors < 64 and long.tensors < 4096
    assert long.peak < 4096
