"""The tokens that SnapKV keeps, against the method written out in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from offload.errors import UnsupportedOperationError
from offload.kv.attention import attend_few
from offload.kv.sparsity.snapkv import POOLED_TOKENS, WINDOW_TOKENS, SnapKv
from tests.kv.sparsity.reference import SCALE, Bool, attention, make_query, padding
from tests.kv.tables import HEADS, Twin, make_table, small_pool

SHARE = 0.4


def _twin(directory: Path, blocks: int, share: float = SHARE) -> Twin:
    twin = Twin(make_table(small_pool(directory, blocks), 2))
    twin.table.sparsity = SnapKv(share)
    return twin


def _read_prompt(twin: Twin, passes: tuple[int, ...], padded: int = 0) -> torch.Tensor:
    """Append and watch; the queries of all tokens."""
    sparsity = twin.table.sparsity
    assert sparsity is not None
    queries = []
    for number, tokens in enumerate(passes):
        twin.append(tokens)
        queries.append(make_query(twin, tokens, seed=number))
        sparsity.watch(twin.table, queries[-1], SCALE, padding(twin, padded) if padded else None)
    return torch.cat(queries, 2)


def _kept(twin: Twin, queries: torch.Tensor, valid: Bool | None) -> tuple[Bool, float]:
    """What the method keeps of the prompt, bool [B, Hk, tokens], and the share of votes that it has."""
    tokens = queries.shape[2]
    old = tokens - WINDOW_TOKENS
    visible = np.ones((2, tokens), np.bool_) if valid is None else valid[:, :tokens]
    keys = twin.keys[:, :, :tokens].double().repeat_interleave(2, 1)
    scores = SCALE * queries[:, :, old:].double() @ keys.mT
    causal = torch.ones(WINDOW_TOKENS, tokens, dtype=torch.bool).tril(old)
    mask = causal & torch.from_numpy(visible)[:, None, None]
    shares = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
    votes = shares[..., :old].sum(2).unflatten(1, (HEADS, 2)).sum(2)
    pooled = F.max_pool1d(votes, POOLED_TOKENS, 1, POOLED_TOKENS // 2)
    pooled = pooled.masked_fill(~torch.from_numpy(visible[:, None, :old]), -1)
    count = int(np.ceil(SHARE * tokens)) - WINDOW_TOKENS
    kept = torch.zeros(2, HEADS, tokens, dtype=torch.bool)
    kept.scatter_(2, pooled.topk(count, 2).indices, True)
    captured = 1 - (votes * ~kept[..., :old]).sum(2).mean().item() / (2 * WINDOW_TOKENS)
    kept[..., old:] = True
    return kept.numpy(), captured


@pytest.mark.parametrize("padded", [0, 61, 105])
@pytest.mark.parametrize("passes", [(150,), (130, 20), (64, 90, 9)])
def test_keeps_what_the_last_queries_vote_for(tmp_path: Path, passes: tuple[int, ...], padded: int) -> None:
    outs = []
    for blocks in (14, 60):
        twin = _twin(tmp_path, blocks)
        queries = _read_prompt(twin, passes, padded)
        for step in range(20):
            twin.append(1)
            query, valid = make_query(twin, 1, seed=50 + step), padding(twin, padded) if padded else None
            outs.append(attend_few(twin.table, query, SCALE, valid=valid))
        twin.table.pool.check()
        counters = twin.table.pool.counters
        assert (counters.blocks_read > 0) == (blocks == 14)
        twin.table.pool.close()
    kept, captured = _kept(twin, queries, valid)
    prompt = queries.shape[2]
    seen = np.ones((2, HEADS, prompt + 20), np.bool_)
    seen[..., :prompt] = kept
    seen &= np.ones_like(seen) if valid is None else valid[:, None]
    assert (outs[-1] - attention(twin, query, seen)[0]).abs().max() < 2e-6
    assert torch.equal(outs[19], outs[39]), "bits depend on where blocks lie"
    assert twin.table.length == prompt + 20 and twin.table.tokens == kept[0, 0].sum() + 20
    assert counters.sparsity.sparse_steps == 20
    assert counters.sparsity.captured / counters.sparsity.measured == pytest.approx(captured, abs=1e-5)
    assert counters.sparsity.evicted_tokens == 2 * (twin.table.length - twin.table.tokens)


def test_nothing_is_evicted_where_all_would_be_kept_or_padding_is_among_the_last(tmp_path: Path) -> None:
    whole, ragged = _twin(tmp_path, 60, share=1.0), _twin(tmp_path, 60)
    _read_prompt(whole, (100,))
    _read_prompt(ragged, (100,), padded=80)
    for twin, padded in ((whole, 0), (ragged, 80)):
        twin.append(1)
        attend_few(twin.table, make_query(twin, 1), SCALE, valid=padding(twin, padded))
        assert twin.table.evicted is None and twin.table.tokens == 101
        twin.check()
    assert ragged.table.pool.counters.sparsity.refused == {"snapkv: padding among a prompt's last tokens"}


def test_a_prompt_that_is_taken_back_in_part_ends_earlier(tmp_path: Path) -> None:
    twin = _twin(tmp_path, 60)
    _read_prompt(twin, (150,))
    twin.crop(147)
    twin.append(1)
    attend_few(twin.table, make_query(twin, 1), SCALE)
    assert twin.table.evicted is not None and twin.table.length == 148
    assert twin.table.evicted.kept == int(np.ceil(SHARE * 147))


def test_holes_of_padding_keep_all(tmp_path: Path) -> None:
    twin = _twin(tmp_path, 60, share=0.9)
    _read_prompt(twin, (150,))
    twin.append(1)
    valid = np.ones((2, 151), np.bool_)
    valid[0, 20:110:2] = False
    attend_few(twin.table, make_query(twin, 1), SCALE, valid=valid)
    assert twin.table.evicted is None
    assert twin.table.pool.counters.sparsity.refused == {"snapkv: padding between a prompt's tokens"}


def test_what_was_evicted_does_not_come_back(tmp_path: Path) -> None:
    twin = _twin(tmp_path, 60)
    _read_prompt(twin, (150,))
    twin.append(1)
    attend_few(twin.table, make_query(twin, 1), SCALE)
    table = twin.table
    kept = table.tokens - 1
    table.append(*(torch.zeros(2, HEADS, 3, part.shape[3]) for part in (twin.keys, twin.values)))
    table.crop(kept)
    with pytest.raises(UnsupportedOperationError, match=r"1 tokens cannot be taken back.*evicted"):
        table.crop(kept - 1)
    assert table.tokens == kept and table.length == 150
    other = table.copy()
    other.select(np.array([1, 1, 0]))
    assert other.length == 150 and other.evicted is not None and len(other.evicted.valid) == 3
    table.pool.check()
    table.pool.close()
