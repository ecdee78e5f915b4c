"""Memory that a step of decode takes beside what is there: none that grows with the history, wherever blocks lie."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from formats.kv import KvLayout
from offload.kv.attention import attend_in_place
from offload.kv.pool import BlockPool
from offload.kv.table import BlockTable, Layouts
from tests.kv.tables import HEADS, SETTINGS, WIDTH, small_pool

SIZE = SETTINGS.block_tokens
PLAIN = KvLayout("fp32", HEADS, WIDTH, WIDTH, SIZE)
PACKED = KvLayout("int8", HEADS, WIDTH, WIDTH, SIZE)
LATENT = KvLayout("fp32", 1, 24, 0, SIZE, 16)
FORMS = {"plain": Layouts(PLAIN, None), "int8": Layouts(PLAIN, PACKED), "latent": Layouts(LATENT, None)}
MOST_NBYTES = 32 << 10
"""Of a step of two layers, at once: results, and descriptions of what is read next. Parts of the longer history are
more than twice as much."""


class Step(NamedTuple):
    """What a step allocated.

    Attributes:
        tensors: bytes of all tensors, one after the other.
        peak: bytes of arrays and objects at once, on all threads; the least of some steps, of which others come upon
            more reads under way.
    """

    tensors: int
    peak: int


def measured(step: Callable[[], object]) -> Step:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [one for one in found.profiler.kineto_results.events() if one.name() == "[memory]"]
    tensors = sum(max(0, one.nbytes()) for one in events)
    peaks = []
    # What a collection frees, and what it calls, is not the step's.
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(4):
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            step()
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
        gc.enable()
    return Step(tensors, min(peaks))


def fill(table: BlockTable, tokens: int) -> None:
    """Up to so many tokens."""
    layout = table.layouts.plain
    shape = table.sequences, layout.kv_heads, tokens - table.tokens
    values = None if layout.value_from_key else torch.randn(*shape, layout.value_width)
    table.append(torch.randn(*shape, layout.key_width), values)


@pytest.fixture
def pools(tmp_path: Path) -> Iterator[Callable[[int], BlockPool]]:
    made: list[BlockPool] = []

    def make(blocks: int) -> BlockPool:
        made.append(small_pool(tmp_path, blocks))
        return made[-1]

    yield make
    for pool in made:
        pool.check()
        pool.close()


@pytest.mark.parametrize(("sequences", "new"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["in RAM", "on disk"])
def test_nothing_that_grows_with_the_history(
    pools: Callable[[int], BlockPool], place: str, form: str, new: int, sequences: int
) -> None:
    """Two layers in turn, each of which reads the other's first blocks ahead."""
    layouts = FORMS[form]
    pool = pools(700 if place == "in RAM" else 40)
    tables = [BlockTable(pool, layouts, SETTINGS, sequences) for _ in range(2)]
    tables[0].follower, tables[1].follower = weakref.ref(tables[1]), weakref.ref(tables[0])
    plain = layouts.plain
    query = torch.randn(sequences, 4 * plain.kv_heads, new, plain.key_width)
    key = torch.randn(sequences, plain.kv_heads, 1, plain.key_width)

    def step() -> None:
        for table in tables:
            table.append(key, None if plain.value_from_key else key)
            attend_in_place(table, query, 0.3)

    steps = []
    for blocks in (30, 120):
        for table in tables:
            # A few steps end within the last block.
            fill(table, blocks * SIZE + 2)
        # What steps keep is made, and has grown.
        step()
        step()
        steps.append(measured(step))
    assert (pool.counters.blocks_read > 0) == (place == "on disk")
    short, long = steps
    assert long.tensors == short.tensors <= MOST_NBYTES
    assert long.peak <= MOST_NBYTES
    assert place == "on disk" or long.peak - short.peak < 4096
