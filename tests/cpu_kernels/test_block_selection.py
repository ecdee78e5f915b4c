"""Attention to chosen blocks against the reference over these blocks alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpu_kernels.block_selection import attend_to_blocks, captured_mass, choose_blocks
from cpu_kernels.paged_attention import paged_attention
from cpu_kernels.paged_attention_reference import block_bytes, paged_attention_reference, read_tokens_reference
from formats.kv import KvLayout
from offload.devices.host_threads import kernel_pool
from tests.cpu_kernels.kv_blocks import Blocks, random_blocks

BATCH, KV_HEADS, GROUP, COLUMNS, WIDTH = 2, 2, 3, 20, 48


def _blocks(format: str) -> tuple[Blocks, torch.Tensor, torch.Tensor]:
    """Blocks, a query, and the keys [B, Hk, S, D] that the blocks hold."""
    layout = KvLayout(format, KV_HEADS, WIDTH, 32)
    blocks = random_blocks(layout, [COLUMNS * 64] * BATCH)
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(BATCH, KV_HEADS * GROUP, 1, WIDTH, generator=generator)
    lists = blocks.addresses.reshape(BATCH, COLUMNS)
    keys = torch.stack([read_tokens_reference(mine, 0, COLUMNS * 64, layout)[0] for mine in lists])
    return blocks, query, keys


def _scores(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The largest score of each block, [B, Hk, C]."""
    scores = query.reshape(BATCH, KV_HEADS, GROUP, WIDTH) @ keys.mT
    return scores.unflatten(3, (COLUMNS, 64)).amax((2, 4))


def test_the_best_blocks_are_chosen_in_order() -> None:
    scores = torch.tensor([[[0.0, 3, 1, 5, 4], [9, 8, 7, 6, 5]]])
    assert choose_blocks(scores, 3).tolist() == [[[0, 3, 4], [0, 1, 2]]]
    assert choose_blocks(scores, 2, always=0).tolist() == [[[3, 4], [0, 1]]]
    assert choose_blocks(scores, 9).tolist() == [[list(range(5))] * 2]


def test_of_equal_blocks_the_first_are_chosen() -> None:
    generator = torch.Generator().manual_seed(1)
    for columns, count in ((1, 1), (300, 7), (300, 299), (300, 300), (2000, 100)):
        scores = torch.randn(2, 3, columns, generator=generator)
        # Few values, of both signs, and what is not finite.
        scores[0] = (4 * scores[0]).round()
        scores[1, 0, ::3] = -torch.inf
        scores[1, 1, ::7] = torch.nan
        scores[1, 2, ::2] *= 1e-30
        ordered = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        expected = ordered.sort(dim=2, descending=True, stable=True).indices[..., :count].sort(dim=2).values
        assert choose_blocks(scores, count, always=0).tolist() == expected.tolist()


def test_blocks_of_padding_come_last_and_the_first_other_one_first() -> None:
    scores = torch.tensor([[[9.0, 8, 1, 2, 3]], [[9.0, 8, 1, 2, 3]]])
    valid = np.ones((2, 23), np.bool_)
    valid[0, :11] = False
    assert choose_blocks(scores, 2, valid=valid, block_tokens=4).tolist() == [[[2, 4]], [[0, 1]]]
    assert choose_blocks(scores, 4, valid=valid, block_tokens=4).tolist() == [[[0, 2, 3, 4]], [[0, 1, 3, 4]]]
    with pytest.raises(ValueError, match="valid: expected"):
        choose_blocks(scores, 2, valid=valid, block_tokens=5)


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
def test_equals_attention_over_the_chosen_blocks(format: str) -> None:
    blocks, query, keys = _blocks(format)
    layout, lists = blocks.layout, blocks.addresses.reshape(BATCH, COLUMNS)
    chosen = choose_blocks(_scores(query, keys), 5)
    poisoned = lists.copy()
    for row in range(BATCH):
        for column in set(range(COLUMNS)) - set(chosen[row].reshape(-1).tolist()):
            block_bytes(int(lists[row, column]), layout)[:] = 0xFF
            poisoned[row, column] = 0
    found, lse = attend_to_blocks(query, poisoned, chosen, layout, 0.3, pool=kernel_pool())
    for row in range(BATCH):
        for head in range(KV_HEADS):
            mine = np.ascontiguousarray(lists[row, chosen[row, head]])
            exact, exact_lse = paged_attention_reference(
                query[row : row + 1], np.array([0, 5]), mine, np.array([320]), np.zeros(1, np.int64),
                np.array([[319]]), layout, 0.3,
            )  # fmt: skip
            own = slice(head * GROUP, (head + 1) * GROUP)
            bound = 2e-4 if layout.has_pairs else 1e-5
            assert (found[row, own].double() - exact[0, own]).abs().max() <= bound
            assert (lse[row, own].double() - exact_lse[0, own]).abs().max() <= bound


def test_all_blocks_are_full_attention_and_have_all_of_its_mass() -> None:
    blocks, query, keys = _blocks("fp32")
    lists = blocks.addresses.reshape(BATCH, COLUMNS)
    tokens = COLUMNS * 64
    whole, whole_lse = paged_attention(
        query, blocks.offsets, blocks.addresses, blocks.lengths, np.zeros(BATCH, np.int64),
        np.full((BATCH, 1), tokens - 1), blocks.layout, 0.3, pool=kernel_pool(),
    )  # fmt: skip
    scores = _scores(query, keys)
    shares = []
    for count in (1, 5, COLUMNS):
        found, lse = attend_to_blocks(
            query, lists, choose_blocks(scores, count), blocks.layout, 0.3, pool=kernel_pool()
        )
        shares.append(captured_mass(lse, whole_lse))
    assert 0 < shares[0] < shares[1] < shares[2] == pytest.approx(1, abs=1e-5)
    assert (found - whole).abs().max() <= 1e-6
