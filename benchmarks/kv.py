"""A KV cache in blocks: time of one layer's decode attention against context, in RAM. Keys and values are random."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from transformers import DynamicCache

from benchmarks.harness import Report, Spread, say
from benchmarks.machine import read_bandwidth
from formats.kv import KvLayout
from offload.devices.host import HostDevice
from offload.kv.attention import attend_in_place
from offload.kv.pool import BlockPool
from offload.kv.spill_file import SpillFile
from offload.kv.table import BlockTable, Layouts
from placement.kv import SETTINGS

HEADS, _KV_HEADS, WIDTH = 32, 4, 128
CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class KvScale:
    """How much to run.

    Attributes:
        contexts: tokens, ascending.
        repeats: calls that are timed at each.
    """

    contexts: tuple[int, ...]
    repeats: int


FULL = KvScale((8192, 16384, 32768, 65536, 131072), 8)
QUICK = KvScale((2048, 4096), 2)


def run(work: Path, scale: KvScale) -> Report:
    """The benchmark; needs 1 GiB of memory."""
    report = Report("kv")
    for format in ("bf16", "int8", "int4"):
        say(f"attention of one layer, {format}, in RAM")
        _against_context(report, work, format, scale)
    say("transformers' own caches")
    _peers(report, scale)
    return report


def _states(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = 1, _KV_HEADS, tokens, WIDTH
    keys, values = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(2))
    return keys, values


def fill(table: BlockTable, tokens: int) -> None:
    keys, values = _states(CHUNK_TOKENS)
    while table.tokens < tokens:
        count = min(CHUNK_TOKENS, tokens - table.tokens)
        table.append(keys[:, :, :count], values[:, :, :count])


def one_layer(pool: BlockPool, format: str) -> BlockTable:
    shape = _KV_HEADS, WIDTH, WIDTH, SETTINGS.block_tokens
    packed = KvLayout(format, *shape) if format != "bf16" else None
    return BlockTable(pool, Layouts(KvLayout("bf16", *shape), packed), SETTINGS, 1)


def _against_context(report: Report, work: Path, format: str, scale: KvScale) -> None:
    """One layer's decode attention with all blocks in RAM; a step appends a token and attends."""
    pool = BlockPool(HostDevice(), 1 << 30, SpillFile(work))
    pool.stage(SETTINGS, one_layer(pool, "bf16").layouts.plain.nbytes)
    table = one_layer(pool, format)
    query = torch.randn(1, HEADS, 1, WIDTH, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    key, value = _states(1, 5)
    rows = report.tables.setdefault("Decode attention of one layer, 32 heads over 4 of 128 channels, in RAM", [])
    means = []

    def step() -> torch.Tensor:
        table.append(key, value)
        return attend_in_place(table, query, 0.1)

    for context in scale.contexts:
        fill(table, context)
        seconds, faults = timed(step, scale.repeats)
        nbytes = sum(int(pool.records.sizes[block]) for block in table.blocks(0, 0, table.columns))
        speed = read_bandwidth()
        median = Spread.of(seconds).median
        means.append(median)
        rows.append(
            {
                "format": format, "context": context, "ms": Spread.of([1e3 * one for one in seconds]),
                "ns a token": 1e9 * median / context, "GB/s": nbytes / median / 1e9,
                "share of read bandwidth": nbytes / median / speed, "page faults a step": faults,
            }
        )  # fmt: skip
    report.target(
        f"{format}: ns a token, longest / half of it",
        (means[-1] / scale.contexts[-1]) / (means[-2] / scale.contexts[-2]), "at most", 1.1,
    )  # fmt: skip
    pool.check()
    pool.close()


def timed(step: Callable[[], object], repeats: int) -> tuple[list[float], float]:
    """Seconds of each step, and page faults of a step: what memory that is allocated anew shows as."""
    step()
    step()
    seconds = []
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(repeats):
        before = perf_counter()
        step()
        seconds.append(perf_counter() - before)
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / repeats


def _peers(report: Report, scale: KvScale) -> None:
    """One layer's step as transformers does it: a cache that concatenates, then its attention."""
    query = torch.randn(1, HEADS, 1, WIDTH, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    key, value = _states(1, 5)
    rows = report.tables.setdefault("The same step with transformers' DynamicCache", [])
    for context in scale.contexts:
        cache = DynamicCache()
        cache.update(*_states(context), 0)

        def step(cache: DynamicCache = cache) -> torch.Tensor:
            keys, values = cache.update(key, value, 0)
            return torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=0.1, enable_gqa=True)

        seconds, faults = timed(step, max(2, scale.repeats // 2))
        rows.append(
            {
                "context": context, "ms": Spread.of([1e3 * one for one in seconds]),
                "ns a token": 1e9 * Spread.of(seconds).median / context, "page faults a step": faults,
            }
        )  # fmt: skip
    report.notes.append("Transformers' offloaded cache needs an accelerator: without one it does not run.")
