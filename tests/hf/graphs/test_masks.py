"""Masks from a position that is a tensor, beside loops over columns."""

from __future__ import annotations

import pytest
import torch

from offload.hf.graphs.masks import Masks

ROOM, WINDOW = 12, 4


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("past", [0, 2, 3, 4, 11])
def test_masks(past: int, added: bool) -> None:
    position = torch.tensor([past])
    valid = torch.ones(2, ROOM, dtype=torch.bool)
    masks = Masks(position, valid, WINDOW, torch.bfloat16, added=added)
    valid[1, :2] = False
    full, window = masks.full(), masks.window()
    assert full.shape == (2, 1, 1, ROOM)
    assert window.shape == (2, 1, 1, WINDOW)
    for mask, first in ((full, 0), (window, past - WINDOW + 1)):
        for batch in range(2):
            for column in range(mask.shape[-1]):
                place = first + column
                sees = 0 <= place <= past and bool(valid[batch, place])
                found = mask[batch, 0, 0, column].item()
                expected = sees if not added else 0.0 if sees else torch.finfo(torch.bfloat16).min
                assert found == expected
