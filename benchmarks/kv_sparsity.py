"""Attention to a part of the KV cache: what a model still recalls, and how much faster a step's attention is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Report, Spread, interleave, ratios, say
from benchmarks.kv_recall import RecallScale, recalled
from cpu_kernels.chosen_attention import ChosenAttention
from cpu_kernels.merge_parts import merge_parts
from examples.tiny_recall.recall import Recalled
from formats.kv import KvLayout
from offload.devices.host import HostDevice
from offload.devices.host_threads import kernel_pool
from offload.kv.attention import attend_few, attend_in_place, parts_in_place
from offload.kv.pool import BlockPool
from offload.kv.sparsity.chosen import attend_to_chosen
from offload.kv.sparsity.top_k import TopK
from offload.kv.spill_file import SpillFile
from offload.kv.table import BlockTable, Layouts
from placement.kv import SETTINGS

SELECTED = 0.05
POINT = 0.01
TOLERANCE = 1e-5
# A few rows of these are multiplied with weights of 16 bits.
ROUNDED_TOLERANCE = 1e-4
_DEPTHS = 5
_HEADS, _KV_HEADS, _WIDTH = 32, 4, 128
_CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class SparsityScale:
    """How much is measured.

    Attributes:
        recall: questions that are asked.
        fillers: kinds of filler between them.
        sparsities: what is compared with full attention.
        contexts: tokens of the histories of one layer that are timed.
        formats: of their blocks.
        repeats: of each timing.
    """

    recall: RecallScale
    fillers: tuple[int, ...]
    sparsities: tuple[str, ...]
    contexts: tuple[int, ...]
    formats: tuple[str, ...]
    repeats: int


FULL = SparsityScale(
    RecallScale(8192, 11, 20), (4, 32), ("top-k:0.05", "snapkv:0.5", "h2o:0.5"), (32768, 131072), ("bf16", "int8"), 9
)
QUICK = SparsityScale(RecallScale(2048, 1, 20), (4,), ("top-k:0.2", "snapkv:0.5", "h2o:0.5"), (2048,), ("bf16",), 2)


def run(work: Path, scale: SparsityScale) -> Report:
    """The benchmark."""
    report = Report("kv_sparsity")
    _recall(report, work, scale)
    for format in scale.formats:
        for context in scale.contexts:
            say(f"attention of one layer, {format}, {context} tokens")
            _time(report, work, format, context, scale.repeats)
    report.notes.append(
        f"{scale.recall.contexts} contexts of {scale.recall.tokens} tokens with {scale.recall.facts} facts each, "
        "examples/tiny_recall in fp32; questions come after the context and are not in it: what a method forgets "
        "before it knows the question is lost. The speed-up is that of a step's attention in one layer with random "
        "keys, the choice and one new token's append included."
    )
    return report


def _recall(report: Report, work: Path, scale: SparsityScale) -> None:
    found: dict[tuple[int, str | None], Recalled] = {}
    for fillers in scale.fillers:
        rows = report.tables.setdefault(f"Recall by depth, % right, {fillers} kinds of filler", [])
        for sparsity in (None, *scale.sparsities):
            say(f"recall, {fillers} kinds of filler, {sparsity or 'full'}")
            kv: dict[str, Any] = {"prefix_cache": 1} if sparsity is None else {"kv_sparsity": sparsity}
            one, mass = recalled(work, scale.recall, fillers, **kv)
            found[fillers, sparsity] = one
            fifths = {f"fifth {part + 1}": round(100 * share, 1) for part, share in enumerate(one.by_depth(_DEPTHS))}
            share = None if mass is None else round(mass, 4)
            rows.append(
                {"attention": sparsity or "full", "all": round(100 * one.accuracy, 1), **fifths, "mass captured": share}
            )
    best = scale.sparsities[0]
    for fillers in scale.fillers:
        less = found[fillers, None].accuracy - found[fillers, best].accuracy
        report.target(f"{best}, {fillers} kinds of filler: accuracy less than full by", less, "at most", POINT)


def _table(pool: BlockPool, format: str, context: int) -> BlockTable:
    shape = _KV_HEADS, _WIDTH, _WIDTH, SETTINGS.block_tokens
    packed = KvLayout(format, *shape) if format != "bf16" else None
    table = BlockTable(pool, Layouts(KvLayout("bf16", *shape), packed), SETTINGS, 1)
    table.sparsity = TopK(SELECTED)
    pool.stage(SETTINGS, table.layouts.plain.nbytes)
    generator = torch.Generator().manual_seed(0)
    while table.tokens < context:
        new = 1, _KV_HEADS, min(_CHUNK_TOKENS, context - table.tokens), _WIDTH
        keys, values = (torch.randn(new, generator=generator).to(torch.bfloat16) for _ in range(2))
        table.append(keys, values)
    return table


def _time(report: Report, work: Path, format: str, context: int, repeats: int) -> None:
    pool = BlockPool(HostDevice(), 1 << 30, SpillFile(work))
    table = _table(pool, format, context)
    query = torch.randn(1, _HEADS, 1, _WIDTH, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    key = torch.randn(1, _KV_HEADS, 1, _WIDTH).to(torch.bfloat16)
    _gate(report, f"{format}, {context} tokens: all blocks, chosen = full", table, query)

    def step(attend: Callable[..., torch.Tensor]) -> float:
        before = perf_counter()
        table.append(key, key)
        attend(table, query, 0.1)
        return perf_counter() - before

    turns = {"full": partial(step, attend_in_place), "top-k": partial(step, attend_few)}
    interleave(turns, 2)
    seconds = interleave(turns, repeats)
    report.tables.setdefault(f"Attention of one layer, {_HEADS} heads over {_KV_HEADS} of {_WIDTH}, in RAM", []).append(
        {
            "format": format, "context": context, "full ms": Spread.of([1e3 * one for one in seconds["full"]]),
            f"top-k:{SELECTED} ms": Spread.of([1e3 * one for one in seconds["top-k"]]),
            "times as fast": ratios(seconds["full"], seconds["top-k"]),
        }
    )  # fmt: skip
    pool.close()


def _gate(report: Report, title: str, table: BlockTable, query: torch.Tensor) -> None:
    """Attention through choosing, of every block, is attention to all."""
    old = table.sealed - 1
    layout, heads = table.layout_of(0), query.shape[1]
    attention = ChosenAttention(layout, 0.1, (1, heads, 1), old, old, table.settings.segment_blocks)
    attention.chosen[:] = np.arange(old)
    chosen = torch.empty(attention.units, 1, heads, 1, layout.output_width), torch.empty(attention.units, 1, heads, 1)
    with table.pool.use():
        attend_to_chosen(table, query, attention, None, *chosen)
        newest = parts_in_place(table, query, 0.1, columns=(old, table.columns), ahead=False)
    out, lse = (torch.cat([part.transpose(0, 1), last], 1) for part, last in zip(chosen, newest, strict=True))
    found = merge_parts(out, lse, None, kernel_pool())
    off = float((found - attend_in_place(table, query, 0.1)).abs().max())
    tolerance = ROUNDED_TOLERANCE if (table.layouts.packed or table.layouts.plain).has_pairs else TOLERANCE
    report.gate(title, off <= tolerance, f"{off:.1e} apart, tolerance {tolerance:.0e}")
