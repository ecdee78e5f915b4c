"""Paged attention against float64 over formats, shapes with edges and poisoned memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cpu_kernels.paged_attention import paged_attention
from cpu_kernels.paged_attention_reference import paged_attention_reference
from cpu_kernels.prepared_attention import BlockLists, PreparedAttention, rows_elements
from cpu_kernels.threads import shared_pool
from formats.kv import KV_FORMATS, KvLayout
from offload.devices.host_threads import kernel_pool
from tests.cpu_kernels.kv_blocks import Blocks, random_blocks

# (kv_heads, key_width, value_width, block_tokens, value_from_key), query heads a group, query tokens, lengths
CASES: list[tuple[tuple[int, ...], int, int, list[int]]] = [
    ((2, 64, 64, 64, 0), 1, 1, [1]),
    ((1, 128, 128, 64, 0), 4, 1, [64, 190]),
    ((2, 128, 64, 128, 0), 8, 1, [1000]),
    ((2, 40, 24, 64, 0), 3, 1, [65, 0, 17]),
    ((1, 17, 33, 64, 0), 7, 2, [130, 63]),
    ((2, 48, 80, 64, 0), 2, 37, [200]),
    ((1, 96, 0, 64, 64), 5, 1, [129]),
    ((1, 576, 0, 64, 512), 16, 1, [150, 20]),
    ((1, 72, 0, 64, 32), 3, 9, [70]),
]
LONG = ((2, 64, 64, 64, 0), 2, 1, [9000])


def _queries(blocks: Blocks, group: int, tokens: int) -> tuple[torch.Tensor, Any]:
    layout = blocks.layout
    generator = torch.Generator().manual_seed(5)
    shape = (len(blocks.lengths), tokens, layout.kv_heads * group, layout.key_width)
    query = torch.randn(shape, generator=generator).transpose(1, 2)
    last = np.maximum(blocks.lengths, 1)[:, None] - 1
    positions = np.maximum(last - tokens + 1 + np.arange(tokens), 0) + 7
    return query, np.ascontiguousarray(positions)


def _compare(blocks: Blocks, group: int, tokens: int, **more: Any) -> None:
    query, positions = _queries(blocks, group, tokens)
    scale = 2 / blocks.layout.key_width**0.5
    first = np.full(len(blocks.lengths), 7, np.int64)
    arguments = (query, blocks.offsets, blocks.addresses, blocks.lengths, first, positions, blocks.layout, scale)
    exact, exact_lse = paged_attention_reference(*arguments, **more)
    found, lse = paged_attention(*arguments, pool=kernel_pool(), **more)
    assert found.shape == exact.shape and found.dtype is lse.dtype is torch.float32
    assert torch.equal(lse.isinf(), exact_lse.isinf())
    seen = ~exact_lse.isinf()
    # A few rows of int8 and int4 are multiplied in integers, with weights of 16 bits.
    rounded = blocks.layout.format in ("int8", "int4") and not blocks.layout.value_from_key and group * tokens <= 8
    lse_bound, bound = (3e-4, 1e-4) if rounded else (3e-5, 2e-5)
    assert ((lse.double() - exact_lse)[seen].abs() <= lse_bound).all()
    assert ((found.double() - exact).abs() <= bound * (1 + exact.abs().max())).all()


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(format: str, case: tuple[tuple[int, ...], int, int, list[int]]) -> None:
    shape, group, tokens, lengths = case
    layout = KvLayout(format, *shape)
    if layout.is_quantised:
        lengths = [-(-length // layout.block_tokens) * layout.block_tokens for length in lengths]
    _compare(random_blocks(layout, lengths), group, tokens)


@pytest.mark.parametrize("format", ["bf16", "int4"])
@pytest.mark.parametrize("tokens", [1, 30])
def test_window_cap_and_padding(format: str, tokens: int) -> None:
    blocks = random_blocks(KvLayout(format, 2, 48, 32), [256, 128])
    valid = np.ones((2, 300), np.bool_)
    valid[0, :20], valid[1, 7:100], valid[1, 120:135] = False, False, False
    for more in ({"window": 50}, {"window": 1}, {"softcap": 1.5}, {"valid": valid}, {"window": 60, "valid": valid}):
        _compare(blocks, 3, tokens, **more)


@pytest.mark.parametrize("format", KV_FORMATS)
def test_bits_do_not_depend_on_threads_or_other_sequences(format: str) -> None:
    shape, group, tokens, lengths = LONG
    blocks = random_blocks(KvLayout(format, *shape), [*lengths, 128])
    query, positions = _queries(blocks, group, tokens)
    first = np.zeros(2, np.int64)
    settings = (blocks.layout, 0.25)
    expected = paged_attention(
        query, blocks.offsets, blocks.addresses, blocks.lengths, first, positions, *settings, pool=shared_pool(1)
    )
    for pool in (shared_pool(3), kernel_pool()):
        found = paged_attention(
            query, blocks.offsets, blocks.addresses, blocks.lengths, first, positions, *settings, pool=pool
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    alone = paged_attention(
        query[1:], blocks.offsets[1:], blocks.addresses, blocks.lengths[1:], first[1:], positions[1:], *settings,
        pool=kernel_pool(),
    )  # fmt: skip
    assert all(torch.equal(a, b[1:]) for a, b in zip(alone, expected, strict=True))
    exact, _ = paged_attention_reference(
        query, blocks.offsets, blocks.addresses, blocks.lengths, first, positions, *settings
    )
    # Scores are large here, and their error with them.
    assert (expected[0].double() - exact).abs().max() <= (5e-4 if format in ("int8", "int4") else 2e-5)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_heads_that_go_together_have_the_bits_of_each_alone(format: str) -> None:
    few = random_blocks(KvLayout(format, 4, 64, 64), [192])
    layout = few.layout
    # Eight runs of each head, which one thread goes through for all heads.
    blocks = 8 * ((256 << 10) // layout.head_nbytes)
    addresses = np.resize(few.addresses, blocks)
    query = torch.randn(1, 12, 1, 64, generator=torch.Generator().manual_seed(6))
    lists = np.array([0, blocks]), np.array([64 * blocks]), np.zeros(1, np.int64), np.array([[64 * blocks - 1]])
    offsets, lengths, first, positions = lists
    together = paged_attention(
        query, offsets, addresses, lengths, first, positions, layout, 0.1, pool=shared_pool(1)
    )  # fmt: skip
    one = KvLayout(format, 1, 64, 64)
    for head in range(4):
        alone = paged_attention(
            query[:, 3 * head : 3 * head + 3], offsets, addresses + head * layout.head_nbytes, lengths, first,
            positions, one, 0.1, pool=shared_pool(1),
        )  # fmt: skip
        assert all(torch.equal(a, b[:, 3 * head : 3 * head + 3]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ("format", "group", "tokens"), [("fp32", 5, 1), ("fp32", 5, 20), ("bf16", 3, 2), ("int8", 3, 2), ("int4", 3, 2)]
)
def test_rows_of_a_chunk_have_the_bits_of_each_alone(format: str, group: int, tokens: int) -> None:
    blocks = random_blocks(KvLayout(format, 1, 48, 32), [200 if format == "fp32" else 192])
    query, positions = _queries(blocks, group, tokens)
    first = np.zeros(1, np.int64)
    lists = (blocks.offsets, blocks.addresses, blocks.lengths, first)
    whole, _ = paged_attention(query, *lists, positions, blocks.layout, 0.3, pool=kernel_pool())
    for t in range(tokens):
        at = np.ascontiguousarray(positions[:, t : t + 1])
        one, _ = paged_attention(query[:, :, t : t + 1], *lists, at, blocks.layout, 0.3, pool=kernel_pool())
        assert torch.equal(one[:, :, 0], whole[:, :, t])


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize(("group", "tokens"), [(1, 1), (3, 2), (8, 1)])
def test_whole_blocks_have_the_bits_of_masked_ones(format: str, group: int, tokens: int) -> None:
    blocks = random_blocks(KvLayout(format, 2, 64, 96), [576, 64])
    query, positions = _queries(blocks, group, tokens)
    query[0, 0] *= 1e3  # most exponentials vanish
    first = np.full(2, 7, np.int64)
    arguments = (query, blocks.offsets, blocks.addresses, blocks.lengths, first, positions, blocks.layout, 0.2)
    all_valid = np.ones((2, 600), np.bool_)
    for window in (None, 200):
        found = paged_attention(*arguments, window=window, pool=kernel_pool())
        masked = paged_attention(*arguments, window=window, valid=all_valid, pool=kernel_pool())
        assert all(torch.equal(a, b) for a, b in zip(found, masked, strict=True))
    if tokens > 1:
        return
    # A query before the last token sees whole blocks; with that token behind a mask none is known to be whole.
    last_hidden = all_valid.copy()
    last_hidden[[0, 1], blocks.lengths + 6] = False
    before = (*arguments[:5], positions - 1, *arguments[6:])
    found = paged_attention(*before, pool=kernel_pool())
    masked = paged_attention(*arguments, valid=last_hidden, pool=kernel_pool())
    assert all(torch.equal(a, b) for a, b in zip(found, masked, strict=True))


@pytest.mark.parametrize("format", ["fp32", "int8", "int4"])
def test_padding_before_whole_blocks_leaves_their_bits(format: str) -> None:
    blocks = random_blocks(KvLayout(format, 2, 64, 96), [384])
    query, positions = _queries(blocks, 4, 1)
    valid = np.ones((1, 600), np.bool_)
    valid[0, : 7 + 128] = False
    found = paged_attention(
        query, blocks.offsets, blocks.addresses, blocks.lengths, np.array([7]), positions, blocks.layout, 0.2,
        valid=valid, pool=kernel_pool(),
    )  # fmt: skip
    alone = paged_attention(
        query, blocks.offsets - np.array([0, 2]), blocks.addresses[2:], blocks.lengths - 128, np.array([135]),
        positions, blocks.layout, 0.2, pool=kernel_pool(),
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_scores_far_apart() -> None:
    blocks = random_blocks(KvLayout("fp32", 2, 32, 32), [300])
    query, positions = _queries(blocks, 2, 1)
    lists = (blocks.offsets, blocks.addresses, blocks.lengths, np.zeros(1, np.int64), positions, blocks.layout)
    found, _ = paged_attention(1e3 * query, *lists, 1e2, pool=kernel_pool())
    exact, _ = paged_attention_reference(1e3 * query, *lists, 1e2)
    assert (found.double() - exact).abs().max() <= 1e-3


@pytest.mark.parametrize("format", ["fp32", "int8", "int4"])
def test_a_nan_stays_in_its_row(format: str) -> None:
    blocks = random_blocks(KvLayout(format, 2, 32, 32), [320])
    query, positions = _queries(blocks, 2, 1)
    lists = (blocks.offsets, blocks.addresses, blocks.lengths, np.zeros(1, np.int64), positions, blocks.layout)
    query[0, 1, 0, 3] = torch.nan
    found, lse = paged_attention(query, *lists, 0.1, pool=kernel_pool())
    assert found[0, 1].isnan().all() and lse[0, 1].isnan().all()
    assert found[0, [0, 2, 3]].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    blocks = random_blocks(KvLayout("fp32", 2, 32, 32), [70])
    query, positions = _queries(blocks, 2, 1)
    good: dict[str, Any] = {
        "query": query,
        "offsets": blocks.offsets,
        "addresses": blocks.addresses,
        "lengths": blocks.lengths,
        "first_positions": np.zeros(1, np.int64),
        "query_positions": positions,
        "layout": blocks.layout,
        "scale": 0.1,
    }
    for message, wrong in (
        ("query: expected", {"query": query[:, :3]}),
        ("query: expected", {"query": query.double()}),
        ("query: expected", {"query": query[..., :16]}),
        ("lengths=", {"lengths": np.array([200], np.int64)}),
        ("offsets: expected", {"offsets": blocks.offsets.astype(np.int32)}),
        ("query_positions: expected", {"query_positions": positions[0]}),
        ("valid: expected", {"valid": np.ones((1, 60), np.bool_)}),
        ("window=0", {"window": 0}),
        ("softcap=-1", {"softcap": -1.0}),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(**{**good, **wrong}, pool=kernel_pool())


@pytest.mark.parametrize("format", ["fp32", "int8"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_lists_of_a_few_sequences_have_the_bits_of_one_query_each(format: str, tokens: int, padded: bool) -> None:
    """Queries and masks are read by the lists' rows; prepared lists write to the places that they are given."""
    blocks = random_blocks(KvLayout(format, 2, 48, 32), [256, 128, 192, 64])
    rows, firsts = np.array([1, 0, 0, 1]), np.array([0, 64, 320, 256])
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 6, tokens, 48, generator=generator)
    last = 511
    positions = np.tile(np.arange(last - tokens + 1, last + 1), (4, 1))
    # Rows of a mask may lie apart.
    valid = np.ones((2, 900), np.bool_)[:, 20:700] if padded else None
    if valid is not None:
        valid[0, :70], valid[1, :9] = False, False
    lists = blocks.offsets, blocks.addresses, blocks.lengths, firsts
    more = {"valid": None if valid is None else valid[rows], "pool": kernel_pool()}
    expected = paged_attention(query[rows], *lists, positions, blocks.layout, 0.3, **more)
    found = paged_attention(
        query, *lists, positions, blocks.layout, 0.3, valid=valid, rows=rows, pool=kernel_pool()
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    places = np.array([4, 1, 0, 2])
    prepared = PreparedAttention(
        BlockLists(blocks.layout, *lists, rows, places, np.array([2]), 2), 0.3,
        torch.full((rows_elements(blocks.layout, 2, 6 * tokens),), torch.nan),
        torch.full((5, 6, tokens, 32), torch.nan), torch.full((5, 6, tokens), torch.nan),
    )  # fmt: skip
    for _ in range(2):
        prepared.attend(query, 192, last, kernel_pool(), valid)
        assert torch.equal(prepared.out[places], expected[0]) and torch.equal(prepared.lse[places], expected[1])
        assert prepared.out[3].isnan().all() and prepared.lse[3].isnan().all()


def test_rows_and_masks_that_do_not_fit_are_refused() -> None:
    blocks = random_blocks(KvLayout("fp32", 2, 48, 32), [64, 64])
    lists = blocks.offsets, blocks.addresses, blocks.lengths, np.zeros(2, np.int64), np.full((2, 1), 63)
    query = torch.zeros(1, 4, 1, 48)
    for rows in (np.array([0, 1]), np.array([-1, 0]), np.zeros(2, np.int32)):
        with pytest.raises(ValueError, match="rows: expected"):
            paged_attention(query, *lists, blocks.layout, 1.0, rows=rows, pool=kernel_pool())
    with pytest.raises(ValueError, match="valid: expected"):
        paged_attention(
            query, *lists, blocks.layout, 1.0, rows=np.zeros(2, np.int64), valid=np.ones((64, 1), np.bool_).T[:, ::2],
            pool=kernel_pool(),
        )  # fmt: skip
