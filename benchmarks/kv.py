"""A KV cache in blocks: time of decode against context, and a long context within a bound on memory.

Keys and values of the context are random; nobody waits for a prompt of 100,000 tokens on two cores.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from benchmarks import checkpoints
from benchmarks.equality import gate_close, relative_rms
from benchmarks.harness import Report, Spread, say
from benchmarks.large_model import PreparedRandom
from benchmarks.machine import read_bandwidth
from formats.kv import KvLayout
from offload.assembly import assemble
from offload.devices.host import HostDevice
from offload.hf.paged.layer import PagedLayer
from offload.kv.attention import attend_in_place
from offload.kv.pool import BlockPool
from offload.kv.spill_file import SpillFile
from offload.kv.table import BlockTable, Layouts
from offload.store import NoProgress
from placement.kv import SETTINGS, KvChoice
from placement.plan import Plan

_HEADS, _KV_HEADS, _WIDTH = 32, 4, 128
_CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class KvScale:
    """How much to run.

    Attributes:
        contexts: tokens, ascending.
        repeats: calls that are timed at each.
        model_context: tokens of the model's context.
        model_layers: of 48.
        ram_nbytes: bound on the whole model, for `model_layers`.
        kv_ram_nbytes: of it for the KV cache.
        new_tokens: decoded by the model.
    """

    contexts: tuple[int, ...]
    repeats: int
    model_context: int
    model_layers: int
    ram_nbytes: int
    kv_ram_nbytes: int
    new_tokens: int


FULL = KvScale(
    contexts=(8192, 16384, 32768, 65536, 131072), repeats=8, model_context=131072, model_layers=12,
    ram_nbytes=3 << 30, kv_ram_nbytes=1 << 30, new_tokens=12,
)  # fmt: skip
QUICK = KvScale(
    contexts=(2048, 4096), repeats=2, model_context=4096, model_layers=2, ram_nbytes=1 << 30,
    kv_ram_nbytes=24 << 20, new_tokens=3,
)  # fmt: skip


def run(work: Path, shape: checkpoints.Shape, scale: KvScale) -> Report:
    """The benchmark; needs the store's room on disk, and memory for the scale's bounds."""
    report = Report("kv")
    for format in ("bf16", "int8", "int4"):
        say(f"attention of one layer, {format}, in RAM")
        _against_context(report, work, format, scale)
    say("transformers' own caches")
    _peers(report, scale)
    say(f"a model with {scale.model_context} tokens of context")
    _model(report, work, shape, scale)
    return report


def _states(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = 1, _KV_HEADS, tokens, _WIDTH
    keys, values = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(2))
    return keys, values


def _fill(table: BlockTable, tokens: int) -> None:
    keys, values = _states(_CHUNK_TOKENS)
    while table.tokens < tokens:
        count = min(_CHUNK_TOKENS, tokens - table.tokens)
        table.append(keys[:, :, :count], values[:, :, :count])


def _table(pool: BlockPool, format: str) -> BlockTable:
    shape = _KV_HEADS, _WIDTH, _WIDTH, SETTINGS.block_tokens
    packed = KvLayout(format, *shape) if format != "bf16" else None
    return BlockTable(pool, Layouts(KvLayout("bf16", *shape), packed), SETTINGS, 1)


def _against_context(report: Report, work: Path, format: str, scale: KvScale) -> None:
    """One layer's decode attention with all blocks in RAM; a step appends a token and attends."""
    pool = BlockPool(HostDevice(), 1 << 30, SpillFile(work))
    pool.stage(SETTINGS, _table(pool, "bf16").layouts.plain.nbytes)
    table = _table(pool, format)
    query = torch.randn(1, _HEADS, 1, _WIDTH, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    key, value = _states(1, 5)
    rows = report.tables.setdefault("Decode attention of one layer, 32 heads over 4 of 128 channels, in RAM", [])
    means = []

    def step() -> torch.Tensor:
        table.append(key, value)
        return attend_in_place(table, query, 0.1)

    for context in scale.contexts:
        _fill(table, context)
        seconds, faults = _timed(step, scale.repeats)
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


def _timed(step: Callable[[], object], repeats: int) -> tuple[list[float], float]:
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
    query = torch.randn(1, _HEADS, 1, _WIDTH, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    key, value = _states(1, 5)
    rows = report.tables.setdefault("The same step with transformers' DynamicCache", [])
    for context in scale.contexts:
        cache = DynamicCache()
        cache.update(*_states(context), 0)

        def step(cache: DynamicCache = cache) -> torch.Tensor:
            keys, values = cache.update(key, value, 0)
            return torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=0.1, enable_gqa=True)

        seconds, faults = _timed(step, max(2, scale.repeats // 2))
        rows.append(
            {
                "context": context, "ms": Spread.of([1e3 * one for one in seconds]),
                "ns a token": 1e9 * Spread.of(seconds).median / context, "page faults a step": faults,
            }
        )  # fmt: skip
    report.notes.append("Transformers' offloaded cache needs an accelerator: without one it does not run.")


@torch.no_grad()
def _model(report: Report, work: Path, shape: checkpoints.Shape, scale: KvScale) -> None:
    kv = KvChoice("int8", scale.kv_ram_nbytes)
    prepared = PreparedRandom(shape, scale.ram_nbytes, scale.model_context + 64, kv)
    plan = prepared.plan
    model = assemble(prepared, checkpoints.store_root(work), NoProgress())
    runtime: Any = model.offload
    try:
        _gate(report, model, shape)
        cache = _long_cache(model, scale.model_context)
        decode = _decode(model, cache, shape, scale.new_tokens)
        stats = runtime.stats()
        assert stats.kv is not None and plan.kv is not None
        # The same steps with next to no context: what is left is attention and waiting for blocks.
        short = _decode(model, DynamicCache(config=model.config), shape, scale.new_tokens)
        alone = Spread.of(decode["s"]).median - Spread.of(short["s"]).median
        predicted = _predicted_s(decode, short, plan, scale)
        median = Spread.of(decode["s"]).median
        report.tables[f"{shape.layers} of 48 layers of a 30B-A3B's, {scale.model_context} tokens of synthetic KV"] = [
            {
                "RAM GiB": scale.ram_nbytes / 2**30, "KV in RAM GiB": stats.kv.ram_nbytes / 2**30,
                "KV on disk GiB": stats.kv.disk_nbytes / 2**30, "peak RSS GiB": _peak_nbytes() / 2**30,
                "tokens/s": Spread.of([1 / one for one in decode["s"]]), "predicted tokens/s": 1 / predicted,
                "s of it for the context": alone, "KV stall share": decode["stall_s"] / sum(decode["s"]),
                "KV read a token GB": decode["read_nbytes"] / len(decode["s"]) / 1e9,
                "expert read share": decode["expert_stall_s"] / sum(decode["s"]),
            }
        ]  # fmt: skip
        report.target("predicted / measured tokens/s, off by", abs(median / predicted - 1), "at most", 0.1)
        report.notes.append(
            "Predicted: a step without context, plus the longer of reading the cold blocks and attending, both at the "
            "speeds that this run measured apart."
        )
    finally:
        runtime.close()


def _predicted_s(decode: dict[str, Any], short: dict[str, Any], plan: Plan, scale: KvScale) -> float:
    """A step without context, plus for each layer the longer of its cold blocks' reads and its attention."""
    assert plan.kv is not None
    nbytes = plan.kv.nbytes_per_token * scale.model_context
    attention_s = nbytes / float(decode["attention_bytes_per_s"])
    read_s = float(decode["read_nbytes"]) / len(decode["s"]) / float(decode["disk_bytes_per_s"])
    return Spread.of(short["s"]).median + max(attention_s, read_s)


def _long_cache(model: PreTrainedModel, tokens: int) -> DynamicCache:
    """A cache of random keys and values, filled through the layers themselves."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([[1, 2]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        assert isinstance(layer, PagedLayer) and layer.table is not None
        layout = layer.table.layouts.plain
        shape = 1, layout.kv_heads, _CHUNK_TOKENS, layout.key_width
        keys, values = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(2))
        while layer.table.tokens < tokens:
            count = min(_CHUNK_TOKENS, tokens - layer.table.tokens)
            layer.table.append(keys[:, :, :count], values[:, :, :count])
    return cache


def _decode(model: PreTrainedModel, cache: DynamicCache, shape: checkpoints.Shape, count: int) -> dict[str, Any]:
    runtime: Any = model.offload
    tokens = checkpoints.random_tokens(count + 2, shape.vocab, 3)
    for token in tokens[:2]:
        model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    before, seconds = runtime.stats(), []
    for token in tokens[2:]:
        start = perf_counter()
        model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        seconds.append(perf_counter() - start)
    after = runtime.stats()
    return {
        "s": seconds,
        "stall_s": after.kv.read_stall_s - before.kv.read_stall_s + after.kv.write_stall_s - before.kv.write_stall_s,
        "read_nbytes": after.kv.bytes_read - before.kv.bytes_read,
        "expert_stall_s": after.read_stall_s - before.read_stall_s,
        **_speeds(runtime.paging),
    }


def _speeds(paging: Any) -> dict[str, float]:
    """Bytes per second of attention in RAM and of reads of segments, apart from the model."""
    pool = BlockPool(HostDevice(), 320 << 20, SpillFile(paging.pool.file.directory))
    pool.stage(SETTINGS, _table(pool, "bf16").layouts.plain.nbytes)
    table = _table(pool, "int8")
    _fill(table, 131072)
    query = torch.randn(1, _HEADS, 1, _WIDTH, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    nbytes = sum(int(pool.records.sizes[block]) for block in table.blocks(0, 0, table.columns))
    seconds, _ = _timed(lambda: attend_in_place(table, query, 0.1), 3)
    pool.close()
    # With room for all segments that are read at once, and about as much of a layer on disk as in the model.
    pool = BlockPool(HostDevice(), 100 << 20, SpillFile(paging.pool.file.directory))
    pool.stage(SETTINGS, _table(pool, "bf16").layouts.plain.nbytes)
    table = _table(pool, "int8")
    _fill(table, 131072)
    before = pool.staging.bytes_read
    start = perf_counter()
    for _ in range(3):
        attend_in_place(table, query, 0.1)
    disk = (pool.staging.bytes_read - before) / (perf_counter() - start)
    pool.close()
    return {"attention_bytes_per_s": nbytes / Spread.of(seconds).median, "disk_bytes_per_s": disk}


def _gate(report: Report, model: PreTrainedModel, shape: checkpoints.Shape) -> None:
    """Decoding over blocks gives what one pass gives."""
    ids = torch.tensor([checkpoints.random_tokens(300, shape.vocab, 1)])
    expected = model(input_ids=ids, logits_to_keep=1).logits[0].float().numpy()
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    found = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[0].float().numpy()
    gate_close(report, "logits: over int8 blocks = in one pass", found, expected, relative_rms, 0.1)
    del cache
    gc.collect()


def _peak_nbytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
