"""Attention over tables against float64, and its bits against where blocks lie."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cpu_kernels.merge_parts import merge_parts
from cpu_kernels.prepared_attention import PreparedAttention
from formats.kv import KvLayout
from offload.devices import host_attention
from offload.devices.base import AttentionBatch, AttentionPart, AttentionWork
from offload.devices.host_threads import kernel_pool
from offload.kv import attention, few_tokens
from offload.kv.attention import attend_by_segments, attend_in_place, parts_in_place
from offload.kv.pool import BlockPool
from offload.kv.staging import Staging
from offload.kv.table import BlockTable, Layouts
from tests.kv.tables import (
    HEADS,
    PLAIN,
    SETTINGS,
    VALUE_WIDTH,
    WIDTH,
    Twin,
    make_table,
    pool_below_cuda,
    random_states,
    small_pool,
)

QUERY_HEADS, SCALE = 2 * HEADS, 0.4
MEMORIES = [(14, 0), (60, 0), (4, 10), (60, 9), (14, 60)]
"""Blocks in RAM and above."""
Bool = npt.NDArray[np.bool_]


def _expected(twin: Twin, query: torch.Tensor, valid: Bool | None, sinks: torch.Tensor | None) -> torch.Tensor:
    tokens, new = twin.keys.shape[2], query.shape[2]
    group = QUERY_HEADS // HEADS
    keys, values = (part.double().repeat_interleave(group, 1) for part in (twin.keys, twin.values))
    scores = SCALE * query.double() @ keys.mT
    seen = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)[None, None]
    if valid is not None:
        seen = seen & torch.from_numpy(valid)[:, None, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(len(query), -1, new, 1)
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ values
    return torch.softmax(scores, -1).nan_to_num(0.0) @ values


def _query(twin: Twin, new: int) -> torch.Tensor:
    return torch.randn(len(twin.keys), QUERY_HEADS, new, WIDTH, generator=torch.Generator().manual_seed(9))


def _padding(twin: Twin) -> Bool:
    valid = np.ones((len(twin.keys), twin.keys.shape[2]), np.bool_)
    # More than a segment of the first sequence is padding.
    valid[0, :37] = False
    return valid


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("new", [1, 3])
def test_in_place(tmp_path: Path, new: int, with_sinks: bool, padded: bool) -> None:
    sinks = torch.randn(QUERY_HEADS, generator=torch.Generator().manual_seed(4)) if with_sinks else None
    outs = []
    for blocks, above in MEMORIES:
        pool = small_pool(tmp_path, blocks, above)
        twin = Twin(make_table(pool, 2))
        for tokens in (100, 41, new):
            twin.append(tokens)
        query, valid = _query(twin, new), _padding(twin) if padded else None
        for _ in range(2):
            outs.append(attend_in_place(twin.table, query, SCALE, valid=valid, sinks=sinks))
        assert (pool.counters.blocks_read > 0) == (blocks + above <= 14)
        assert pool.counters.accelerated_steps == (2 if above else 0)
        pool.check()
        pool.close()
    error = (outs[0] - _expected(twin, query, valid, sinks)).abs().max()
    assert error < 2e-6
    assert all(torch.equal(outs[0], other) for other in outs[1:]), "bits depend on where blocks lie"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fake's memory is the host's")
def test_segments_that_a_gpu_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Consecutive ones of a sequence are one list, packed and plain ones apart; the rest is the CPU's."""
    from offload.devices.cuda import CudaDevice

    lists: list[tuple[list[int], list[int], list[int]]] = []
    start = CudaDevice.start_attention

    def attend(self: CudaDevice, batch: AttentionBatch) -> AttentionWork:
        lists.append((np.diff(batch.offsets).tolist(), batch.lengths.tolist(), batch.first_positions.tolist()))
        return start(self, batch)

    monkeypatch.setattr(CudaDevice, "start_attention", attend)
    for packed, above in ((None, 30), ("int8", 60), (None, 13)):
        pool = pool_below_cuda(tmp_path, 30, above)
        twin = Twin(make_table(pool, 2, packed))
        for tokens in (150, 1):
            twin.append(tokens)
        query, valid = _query(twin, 1), _padding(twin)
        out = attend_in_place(twin.table, query, SCALE, valid=valid)
        bound = 2e-6 if packed is None else 2e-2
        assert (out - _expected(twin, query, valid, None)).abs().max() < bound
        pool.check()
        pool.close()
    whole, packed_ones, plain_ones, newest = lists
    assert whole == ([10, 10], [151, 151], [0, 0])
    assert packed_ones == ([7, 7], [112, 112], [0, 0])
    assert plain_ones == ([3, 3], [39, 39], [112, 112])
    assert all(0 < blocks < 10 for blocks in newest[0])
    assert [first + length for first, length in zip(newest[2], newest[1], strict=True)] == [151] * len(newest[0])


@pytest.mark.parametrize("packed", [None, "int8"])
def test_what_has_arrived_is_attended_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: str | None
) -> None:
    """In fewer calls, each of one layout; the bits are those of one after the other."""
    settings = replace(SETTINGS, staging_segments=6)
    calls: list[int] = []

    def attend(
        batch: AttentionBatch, into: AttentionPart | None = None, rows: npt.NDArray[np.int64] | None = None
    ) -> AttentionPart:
        calls.append(len(batch.lengths))
        return host_attention.attend(batch, into, rows)

    monkeypatch.setattr(few_tokens, "attend", attend)
    outs, counts = [], []
    for together in (False, True):
        monkeypatch.setattr(Staging, "has_arrived", lambda self, key, all=together: all and self.is_started(key))
        pool = small_pool(tmp_path, 30)
        pool.stage(settings, PLAIN.nbytes)
        layout = None if packed is None else KvLayout(packed, HEADS, WIDTH, VALUE_WIDTH, settings.block_tokens)
        twin = Twin(BlockTable(pool, Layouts(PLAIN, layout), settings, 2))
        for tokens in (400, 41, 1):
            twin.append(tokens)
        calls.clear()
        outs.append(attend_in_place(twin.table, _query(twin, 1), SCALE))
        counts.append(list(calls))
        pool.check()
        pool.close()
    assert torch.equal(*outs)
    one_by_one, at_once = counts
    assert sum(one_by_one) == sum(at_once)
    assert len(at_once) < len(one_by_one)
    assert max(at_once[-3:]) <= 3


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_by_segments(tmp_path: Path, with_sinks: bool, padded: bool) -> None:
    sinks = torch.randn(QUERY_HEADS, generator=torch.Generator().manual_seed(4)) if with_sinks else None
    new, outs = 30, []
    for blocks, above in MEMORIES:
        pool = small_pool(tmp_path, blocks, above)
        twin = Twin(make_table(pool, 2))
        for tokens in (90, 21, new):
            twin.append(tokens)
        query, valid = _query(twin, new), _padding(twin) if padded else None
        keys, values = twin.keys[:, :, -new:], twin.values[:, :, -new:]
        outs.append(attend_by_segments(twin.table, query, keys, values, SCALE, valid=valid, sinks=sinks))
        pool.check()
        pool.close()
    assert (outs[0] - _expected(twin, query, valid, sinks)).abs().max() < 2e-6
    assert all(torch.equal(outs[0], other) for other in outs[1:]), "bits depend on where blocks lie"


def test_padding_in_the_new_tokens(tmp_path: Path) -> None:
    pool = small_pool(tmp_path, 20)
    twin = Twin(make_table(pool, 2))
    twin.append(20)
    twin.append(30)
    valid = np.ones((2, 50), np.bool_)
    valid[1, :35] = False
    query = _query(twin, 30)
    keys, values = twin.keys[:, :, -30:], twin.values[:, :, -30:]
    found = attend_by_segments(twin.table, query, keys, values, SCALE, valid=valid)
    assert torch.isfinite(found).all()
    assert (found - _expected(twin, query, valid, None)).abs().max() < 2e-6
    pool.close()


def _two_layers(directory: Path) -> tuple[BlockPool, list[Twin]]:
    """The second of which is read ahead after the first; most blocks are on disk."""
    pool = small_pool(directory, 14)
    twins = [Twin(make_table(pool, 1), seed) for seed in range(2)]
    for twin in twins:
        twin.append(200)
    twins[0].table.follower = weakref.ref(twins[1].table)
    return pool, twins


def test_the_next_layer_is_read_ahead(tmp_path: Path) -> None:
    pool, twins = _two_layers(tmp_path)
    query = _query(twins[0], 1)
    attend_in_place(twins[0].table, query, SCALE)
    before = pool.counters.blocks_read
    assert pool.staging.is_busy
    # What was read ahead is not read again, and a block that is forgotten meanwhile is not mistaken for another.
    found = attend_in_place(twins[1].table, query, SCALE)
    assert (found - _expected(twins[1], query, None, None)).abs().max() < 2e-6
    assert pool.counters.blocks_read > before
    twins[1].crop(20)
    twins[1].append(150)
    found = attend_in_place(twins[1].table, query, SCALE)
    assert (found - _expected(twins[1], query, None, None)).abs().max() < 2e-6
    pool.check()
    pool.close()


@pytest.mark.parametrize("kept", [True, False])
def test_what_was_read_ahead_makes_room_for_reads_beside_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    pool, twins = _two_layers(tmp_path)
    query = _query(twins[0], 1)
    attend = attend_in_place if kept else parts_in_place
    attend(twins[0].table, query, SCALE)
    order: list[str] = []
    start, ahead = Staging.start, frozenset(pool.staging._started)
    assert ahead

    def starting(self: Staging, key: bytes, *told: Any) -> bool:
        begun = start(self, key, *told)
        order.extend(["read"] * (begun and key not in ahead))
        return begun

    def attending(batch: AttentionBatch, *told: Any, **named: Any) -> AttentionPart:
        order.append("here" if batch.first_positions[0] else "ahead")
        return host_attention.attend(batch, *told, **named)

    def attending_kept(self: PreparedAttention, *told: Any) -> None:
        order.append("here")
        prepared(self, *told)

    prepared = PreparedAttention.attend
    monkeypatch.setattr(Staging, "has_arrived", lambda self, key: key in ahead)
    monkeypatch.setattr(Staging, "start", starting)
    monkeypatch.setattr(PreparedAttention, "attend", attending_kept)
    for module in few_tokens, attention:
        monkeypatch.setattr(module, "attend", attending)
    found = attend(twins[1].table, query, SCALE)
    out = found if isinstance(found, torch.Tensor) else merge_parts(*found, None, kernel_pool())
    assert (out - _expected(twins[1], query, None, None)).abs().max() < 2e-6
    assert order[0] == "ahead"
    assert "read" in order[: order.index("here")]
    pool.check()
    pool.close()


@pytest.mark.parametrize("packed", [None, "int8"])
@pytest.mark.parametrize(("sequences", "padded", "with_sinks"), [(1, False, False), (1, False, True), (2, True, True)])
@pytest.mark.parametrize(("blocks", "above"), [(9, 0), (4, 5)])
def test_token_after_token_has_the_bits_of_all_parts(
    tmp_path: Path, packed: str | None, sequences: int, padded: bool, with_sinks: bool, blocks: int, above: int
) -> None:
    """What is kept from one token to the next, while blocks come, go, move and are cut off, for two tables in turn."""
    sinks = torch.randn(QUERY_HEADS, generator=torch.Generator().manual_seed(4)) if with_sinks else None
    pool = small_pool(tmp_path, blocks * sequences, above * sequences)
    twins = [Twin(make_table(pool, sequences, packed), seed) for seed in range(2)]
    kept = 0
    for step in range(90):
        twin = twins[step % 2]
        before = twin.table.few_tokens
        if step == 40:
            twin.table.crop(7)
        elif step == 50:
            twin.table.select(np.arange(sequences))
        twin.table.append(*random_states(twin.generator, sequences, 1 if step % 30 else 35))
        query = torch.randn(sequences, QUERY_HEADS, 1, WIDTH, generator=torch.Generator().manual_seed(step))
        valid = np.ones((sequences, twin.table.tokens), np.bool_) if padded else None
        if valid is not None:
            valid[0, : min(37, twin.table.tokens - 1)] = False
        found = attend_in_place(twin.table, query, SCALE, valid=valid, sinks=sinks)
        parts = parts_in_place(twin.table, query, SCALE, valid=valid)
        assert torch.equal(found, merge_parts(*parts, sinks, kernel_pool())), step
        kept += twin.table.few_tokens is before and before is not None
    assert kept > 20 and pool.below.blocks_written > 0
    assert (pool.counters.accelerated_steps > 0) == (above > 0)
    pool.close()
