"""The blocks that H2O keeps, against attention added up in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from offload.kv.attention import attend_few
from offload.kv.sparsity.h2o import SAMPLED_QUERIES, H2o
from tests.kv.sparsity.reference import SCALE, Bool, attention, make_query, padding
from tests.kv.tables import HEADS, SETTINGS, Twin, make_table, small_pool

SIZE, SHARE = SETTINGS.block_tokens, 0.4


class _Reference:
    """Which blocks are left, by original column, and the attention that each has had; float64."""

    def __init__(self, twin: Twin, padded: int) -> None:
        self.twin = twin
        self.padded = padded
        self.left = [list(range(0)) for _ in range(2)]
        self.mass: list[dict[int, float]] = [{}, {}]

    def see(self, query: torch.Tensor, weight: float) -> torch.Tensor:
        """Attention of some of the last tokens; [B, Hq, T, V]."""
        seen = self._seen()
        out, lse = attention(self.twin, query, seen)
        keys = self.twin.keys.double().repeat_interleave(2, 1)
        tokens, new = keys.shape[2], query.shape[2]
        shares = torch.exp(SCALE * query.double() @ keys.mT - lse[..., None])
        causal = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)
        shares = shares * (causal & torch.from_numpy(seen).repeat_interleave(2, 1)[:, :, None])
        # Padding sees nothing.
        shares.nan_to_num_(0.0)
        for row in range(2):
            for column in self.left[row]:
                mass = shares[row, :, :, column * SIZE : (column + 1) * SIZE].sum().item()
                self.mass[row][column] = self.mass[row].get(column, 0.0) + weight * mass
        return out

    def _seen(self) -> Bool:
        tokens = self.twin.keys.shape[2]
        seen = np.zeros((2, HEADS, tokens), np.bool_)
        for row in range(2):
            known = {*self.left[row], *self.mass[row]}
            new = range(max(known, default=-1) + 1, -(-tokens // SIZE))
            self.left[row] += list(new)
            for column in self.left[row]:
                seen[row, :, column * SIZE : (column + 1) * SIZE] = True
        return seen & padding(self.twin, self.padded)[:, None]

    def evict(self) -> None:
        tokens = self.twin.keys.shape[2]
        budget = max(2, int(np.ceil(SHARE * -(-tokens // SIZE))))
        sealed = tokens // SIZE
        for row in range(2):
            newest = self.left[row][len(self.left[row]) - budget // 2 :]
            old = [column for column in self.left[row] if column not in newest and column < sealed]
            excess = min(len(self.left[row]) - budget, len(old))
            for column in sorted(old, key=lambda one: self.mass[row][one])[: max(0, excess)]:
                self.left[row].remove(column)


@pytest.mark.parametrize("padded", [0, 41])
@pytest.mark.parametrize("blocks", [14, 60])
def test_keeps_heavy_hitters_and_the_newest(tmp_path: Path, blocks: int, padded: int) -> None:
    twin = Twin(make_table(small_pool(tmp_path, blocks), 2))
    sparsity = twin.table.sparsity = H2o(SHARE)
    reference = _Reference(twin, padded)
    for number, tokens in enumerate((SAMPLED_QUERIES, 2 * SAMPLED_QUERIES, 170)):
        twin.append(tokens)
        query = make_query(twin, tokens, seed=number)
        sparsity.watch(twin.table, query, SCALE, padding(twin, padded) if padded else None)
        picked = np.unique(np.linspace(0, tokens - 1, SAMPLED_QUERIES).round().astype(int))
        for at in picked:
            # Of a token in the middle, nothing later is seen.
            before = Twin.__new__(Twin)
            end = twin.keys.shape[2] - tokens + at + 1
            before.keys, before.values = twin.keys[:, :, :end], twin.values[:, :, :end]
            reference.twin = before
            reference.see(query[:, :, at : at + 1], tokens / len(picked))
    for step in range(60):
        new = 2 if step % 7 == 3 else 1
        twin.append(new)
        reference.twin = twin
        query = make_query(twin, new, seed=100 + step)
        valid = padding(twin, padded) if padded else None
        found = attend_few(twin.table, query, SCALE, valid=valid)
        expected = reference.see(query, 1.0)
        assert (found - expected).abs().max() < 2e-6, step
        reference.evict()
        assert twin.table.columns == len(reference.left[0])
    counters, pool = twin.table.pool.counters, twin.table.pool
    assert twin.table.length == twin.keys.shape[2] > twin.table.tokens
    assert counters.sparsity.evicted_tokens == 2 * (twin.table.length - twin.table.tokens)
    assert counters.sparsity.measured == 1 and 0 < counters.sparsity.captured < 1
    assert counters.sparsity.full_steps == 1 and counters.sparsity.sparse_steps == 59
    pool.check()
    pool.close()


def test_follows_what_happens_to_the_table(tmp_path: Path) -> None:
    twin = Twin(make_table(small_pool(tmp_path, 60), 2))
    sparsity = twin.table.sparsity = H2o(SHARE)
    twin.append(200)
    sparsity.watch(twin.table, make_query(twin, 200), SCALE, None)
    twin.append(1)
    attend_few(twin.table, make_query(twin, 1), SCALE)
    table = twin.table
    other = table.copy()
    kept = table.tokens
    for one, rows in ((other, [1, 0, 1]), (table, [1])):
        one.select(np.array(rows))
        new = torch.zeros(len(rows), HEADS, 3, twin.keys.shape[3]), torch.zeros(len(rows), HEADS, 3, 8)
        one.append(*new)
        one.crop(one.tokens - 2)
        query = make_query(twin, 1)[[1] * len(rows)]
        found = attend_few(one, query, SCALE)
        keys, values = one.read(0, 0, kept + 1)
        scores = SCALE * query[0].double() @ keys.double().repeat_interleave(2, 0).mT
        expected = torch.softmax(scores, -1) @ values.double().repeat_interleave(2, 0)
        assert (found[0] - expected).abs().max() < 2e-6
    table.pool.check()
    table.pool.close()
