"""Attention to the best blocks, against the same choice by the reference of sketches and attention in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cpu_kernels.key_sketch_reference import largest_scores_reference
from formats.key_sketch import SketchLayout, sketch_keys
from offload.kv.attention import attend_few, attend_in_place
from offload.kv.sparsity.top_k import TopK
from tests.kv.sparsity.reference import QUERY_HEADS, SCALE, Bool, attention, make_query, padding
from tests.kv.tables import HEADS, PLAIN, SETTINGS, WIDTH, Twin, make_table, small_pool

SIZE = SETTINGS.block_tokens
SHARE = 0.25
SKETCH = SketchLayout(WIDTH, SIZE)


def _twin(directory: Path, blocks: int, sequences: int = 2, packed: str | None = None) -> Twin:
    twin = Twin(make_table(small_pool(directory, blocks), sequences, packed))
    twin.table.sparsity = TopK(SHARE)
    return twin


def _seen(twin: Twin, query: torch.Tensor, valid: Bool | None = None) -> Bool:
    """What the references choose: bool [B, Hk, tokens]."""
    batch, tokens, new = len(twin.keys), twin.keys.shape[2], query.shape[2]
    old = (tokens - max(SETTINGS.recent_tokens, new)) // SIZE
    count = int(np.ceil(SHARE * old))
    valid = np.ones((batch, tokens), np.bool_) if valid is None else valid
    seen = np.zeros((batch, HEADS, tokens), np.bool_)
    seen[:, :, old * SIZE :] = True
    for row in range(batch):
        for head in range(HEADS):
            q = query[row : row + 1, head * 2 : head * 2 + 2]
            scores = []
            for column in range(old):
                span = slice(column * SIZE, (column + 1) * SIZE)
                sketch = sketch_keys(twin.keys[row, head, span].float().numpy(), SKETCH)
                score = largest_scores_reference(q, torch.from_numpy(sketch)[None, None, None], SKETCH).item()
                scores.append(score if valid[row, span].any() else -np.inf)
            first = next(column for column in range(old) if valid[row, column * SIZE : (column + 1) * SIZE].any())
            scores[first] = np.inf
            for column in np.argsort(scores)[::-1][:count]:
                seen[row, head, column * SIZE : (column + 1) * SIZE] = True
    return seen & valid[:, None]


@pytest.mark.parametrize("padded", [0, 37, 150])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("new", [1, 3])
def test_equals_attention_to_the_blocks_with_the_largest_estimates(
    tmp_path: Path, new: int, with_sinks: bool, padded: int
) -> None:
    sinks = torch.randn(QUERY_HEADS, generator=torch.Generator().manual_seed(4)) if with_sinks else None
    outs = []
    for blocks in (14, 60):
        twin = _twin(tmp_path, blocks)
        for tokens in (200, 41, new):
            twin.append(tokens)
        query, valid = make_query(twin, new), padding(twin, padded) if padded else None
        for _ in range(2):
            outs.append(attend_few(twin.table, query, SCALE, valid=valid, sinks=sinks))
        pool = twin.table.pool
        assert (pool.counters.blocks_read > 0) == (blocks == 14)
        pool.check()
        pool.close()
    expected, lse = attention(twin, query, _seen(twin, query, valid), sinks)
    assert (outs[0] - expected).abs().max() < 2e-6
    assert all(torch.equal(outs[0], other) for other in outs[1:]), "bits depend on where blocks lie"
    counters = pool.counters.sparsity
    assert (counters.sparse_steps, counters.full_steps, counters.measured) == (2, 0, 1)
    everything = np.ones((2, HEADS, twin.table.tokens), np.bool_) if valid is None else valid[:, None].repeat(HEADS, 1)
    whole = attention(twin, query, everything)[1]
    assert counters.captured == pytest.approx(torch.exp(lse - whole).mean().item(), abs=1e-5)


def test_blocks_that_nobody_chose_are_not_read_from_disk(tmp_path: Path) -> None:
    twin = _twin(tmp_path, 14, sequences=1)
    twin.append(16 * SIZE + 5)
    twin.append(16 * SIZE)
    twin.append(1)
    pool, query = twin.table.pool, make_query(twin, 1)
    attend_few(twin.table, query, SCALE)
    pool.staging.drop_all()
    before, cold = pool.staging.bytes_read, pool.addresses[twin.table.blocks(0, 0, twin.table.columns)] == 0
    attend_few(twin.table, query, SCALE)
    chosen = _seen(twin, query).any(1)[0, : 32 * SIZE].reshape(-1, SIZE).any(1)
    wanted = int((chosen & cold[:32]).sum())
    assert 0 < wanted < int(cold.sum())
    assert pool.staging.bytes_read - before == wanted * PLAIN.nbytes
    attend_in_place(twin.table, query, SCALE)
    assert pool.staging.bytes_read - before >= (wanted + int(cold.sum())) * PLAIN.nbytes
    pool.close()


def test_of_blocks_in_memory_those_that_nobody_chose_are_not_looked_at(tmp_path: Path) -> None:
    twin = _twin(tmp_path, 60, sequences=1)
    twin.append(20 * SIZE)
    twin.append(1)
    query = make_query(twin, 1)
    expected = attend_few(twin.table, query, SCALE)
    chosen = _seen(twin, query)[0].reshape(HEADS, -1)[:, : 20 * SIZE].reshape(HEADS, 20, SIZE).any((0, 2))
    pool = twin.table.pool
    pool.addresses[twin.table.blocks(0, 0, 20)[~chosen]] = 1  # whoever reads there ends the process
    assert torch.equal(attend_few(twin.table, query, SCALE), expected)
    pool.staging.close()


def test_a_short_history_is_attended_to_in_full(tmp_path: Path) -> None:
    twin = _twin(tmp_path, 60)
    for tokens in (SETTINGS.recent_tokens + SIZE, 1):
        twin.append(tokens)
        query = make_query(twin, 1)
        found = attend_few(twin.table, query, SCALE)
        assert torch.equal(found, attend_in_place(twin.table, query, SCALE))
    counters = twin.table.pool.counters.sparsity
    assert (counters.sparse_steps, counters.full_steps) == (0, 2)
    twin.table.pool.close()


@pytest.mark.parametrize("blocks", [14, 60])
def test_follows_what_happens_to_the_table(tmp_path: Path, blocks: int) -> None:
    twin = _twin(tmp_path, blocks)
    twin.append(250)
    twin.append(30)
    other = twin.copy()
    twin.crop(210)
    twin.select([1, 1, 0])
    for one in (twin, other):
        one.append(37)
        query = make_query(one, 1)
        found = attend_few(one.table, query, SCALE)
        assert (found - attention(one, query, _seen(one, query))[0]).abs().max() < 2e-6
    assert twin.table.pool.counters.sparsity.sparse_steps == 2
    twin.table.pool.check()
    twin.table.pool.close()


@pytest.mark.parametrize("format", ["int8", "fp8_e4m3"])
def test_landmarks_are_of_what_packed_blocks_hold(tmp_path: Path, format: str) -> None:
    twin = _twin(tmp_path, 60, packed=format)
    twin.append(200)
    twin.append(41)
    rows = [twin.table.read(row, 0, 241) for row in range(2)]
    twin.keys, twin.values = (torch.stack([row[side] for row in rows]) for side in (0, 1))
    query = make_query(twin, 1)
    found = attend_few(twin.table, query, SCALE)
    assert (found - attention(twin, query, _seen(twin, query))[0]).abs().max() < (1e-4 if format == "int8" else 5e-6)
    assert twin.table.pool.counters.sparsity.sparse_steps == 1
    twin.table.pool.close()
