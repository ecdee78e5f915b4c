"""A model of the size of Qwen3-30B-A3B in int4 with a long context of int8 KV within a bound on memory.

A part of the experts and of the cache's blocks lie on disk. What is measured stands beside what the planner expects of
this machine's profile, as `offload plan` says it, of that profile at the speeds that a probe finds before each few
tokens, and beside a prediction from speeds that the run measures apart.
Keys and values of the context are random; nobody waits for a prompt of 100,000 tokens on two cores.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from benchmarks import checkpoints
from benchmarks.equality import gate_close, relative_rms
from benchmarks.harness import Report, Spread, say
from benchmarks.kv import CHUNK_TOKENS, HEADS, WIDTH, fill, one_layer, timed
from benchmarks.large_model import QUANT, PreparedRandom
from benchmarks.machine import memory_status, reset_peak
from offload.assembly import assemble
from offload.devices.host import HostDevice
from offload.hf.paged.layer import PagedLayer
from offload.kv.attention import attend_in_place
from offload.kv.pool import BlockPool
from offload.kv.spill_file import SpillFile
from offload.machine_profile import measure_profile
from offload.measuring.reads import FileReads
from offload.measuring.subjects import RuntimeSubjects
from offload.store import NoProgress, catalog
from placement.hardware_profile import HardwareProfile
from placement.kv import SETTINGS, KvChoice
from placement.plan import Plan
from placement.planner import make_plan
from placement.prediction import PassPrediction
from profiler.probe import probe

_FORMAT = "int8"
_ROOM_TOKENS = 1024
"""Beside the context: for what is decoded, and for the blocks of a second cache, which are written in 16 bits. A block
on disk makes its whole layer slower."""
_TURNS = 3
"""Each with a probe before it: shared machines change their speeds within seconds."""
_BASE_TOKENS = 128
"""Of random context below the steps that predictions from parts begin with, which blocks in memory hold. With none a
step's tokens attend to few others, the same for all steps, which makes their routing alike: more experts are found."""


@dataclass(frozen=True)
class KvModelScale:
    """How much to run.

    Attributes:
        context: tokens.
        ram_nbytes: bound on the whole model.
        kv_ram_nbytes: of it for the KV cache, one after the other; None: what the plan gives it.
        new_tokens: decoded with each.
        quick_profile: whether the profile is the quick one.
    """

    context: int
    ram_nbytes: int
    kv_ram_nbytes: tuple[int | None, ...]
    new_tokens: int
    quick_profile: bool


FULL = KvModelScale(131072, 12 << 30, (4 << 30, None), 12, False)
QUICK = KvModelScale(4096, 1 << 30, (24 << 20,), 3, True)


@dataclass(frozen=True)
class _Decoded:
    """Steps of decode.

    Attributes:
        seconds: of each.
        kv_stall_s: of all, waiting for blocks.
        kv_nbytes: of all, read of the cache from disk.
        expert_stall_s: of all, waiting for experts.
        hit_rate: of experts.
    """

    seconds: list[float]
    kv_stall_s: float
    kv_nbytes: float
    expert_stall_s: float
    hit_rate: float

    @property
    def median_s(self) -> float:
        """Of a step."""
        return Spread.of(self.seconds).median


def run(work: Path, shape: checkpoints.Shape, scale: KvModelScale) -> Report:
    """The benchmark; needs room on disk for the store and the cache, and memory for the scale's bound."""
    report = Report("kv_model")
    root = checkpoints.store_root(work)
    for kv_ram in scale.kv_ram_nbytes:
        say("measuring the machine")
        profile, _ = measure_profile(root, quick=scale.quick_profile, say=lambda _what: None)
        _measure(report, root, shape, scale, kv_ram, profile)
        gc.collect()
    report.notes.append(
        "Predicted by the plan: with a profile that the run measured before it loaded the model, and with that profile "
        "at the speeds that a probe finds right before each of three turns of decode. Predicted by parts: a step "
        f"with {_BASE_TOKENS} tokens of context, plus the longer of reading the cold blocks and attending, both at the "
        "speeds that this run measured apart after each turn."
    )
    return report


@torch.no_grad()
def _measure(
    report: Report, root: Path, shape: checkpoints.Shape, scale: KvModelScale, kv_ram: int | None,
    profile: HardwareProfile,
) -> None:  # fmt: skip
    kv = KvChoice(_FORMAT, kv_ram)
    prepared = PreparedRandom(shape, scale.ram_nbytes, scale.context + _ROOM_TOKENS, kv)
    title = f"{shape.layers} layers of 30B-A3B's shape, {scale.context} tokens of synthetic KV"
    say(f"loading, bound on KV in RAM: {kv_ram}")
    gc.collect()
    reset_peak()
    before_nbytes = memory_status()["VmRSS"]
    model = assemble(prepared, root, NoProgress())
    runtime: Any = model.offload
    try:
        _gate(report, model, shape)
        say(f"{scale.context} tokens of context")
        cache = _long_cache(model, scale.context)
        say("decoding")
        peak_nbytes = memory_status()["VmHWM"]
        expected = _expected(prepared, profile, scale, kv)
        base_cache = _long_cache(model, _BASE_TOKENS)
        directory = Path(runtime.paging.pool.file.directory)
        turns, expected_now, bases, parts_s = [], [], [], []
        for turn in range(_TURNS):
            # The profile's products ran on threads that wait in a loop, which those of decode from disk do not.
            runtime._wait_shortly(decode=False)
            now = _at_this_moment(profile, prepared, root)
            expected_now.append(_expected(prepared, now, scale, kv))
            # The probe took memory of its own.
            reset_peak()
            turns.append(_decode(model, cache, shape, scale.new_tokens // _TURNS, 3 + turn))
            peak_nbytes = max(peak_nbytes, memory_status()["VmHWM"])
            # Of other tokens, whose experts are as new: attention and blocks are the rest.
            bases.append(_decode(model, base_cache, shape, scale.new_tokens // _TURNS, 3 + _TURNS + turn))
            parts_s.append(_from_parts_s(turns[-1], bases[-1], runtime.plan, scale, directory))
        decode, base, stats = _all_of(turns), _all_of(bases), runtime.stats()
        # Only what lies close together can be compared.
        off_now, off_parts = (
            Spread.of([turn.median_s / one for turn, one in zip(turns, expected_s, strict=True)]).median
            for expected_s in ([one.seconds for one in expected_now], parts_s)
        )  # fmt: skip
        whole_s = sum(decode.seconds)
        where = {"KV in RAM GiB": stats.kv.ram_nbytes / 2**30, "KV on disk GiB": stats.kv.disk_nbytes / 2**30}
        report.tables.setdefault(f"{title}: GiB", []).append(
            {
                **where, "bound": scale.ram_nbytes / 2**30, "planned peak": runtime.plan.peak_ram_nbytes / 2**30,
                "peak RSS over that before loading": (peak_nbytes - before_nbytes) / 2**30,
                "peak RSS": peak_nbytes / 2**30,
            }
        )  # fmt: skip
        report.tables.setdefault(f"{title}: tokens/s", []).append(
            {
                **where, "measured": Spread.of([1 / one for one in decode.seconds]),
                "by the plan": expected.tokens_per_s,
                "at the moment's speeds": Spread.of([one.tokens_per_s for one in expected_now]),
                "from parts": Spread.of([1 / one for one in parts_s]),
            }
        )  # fmt: skip
        report.tables.setdefault(f"{title}: a token", []).append(
            {
                **where, "s": decode.median_s, "s for the context": decode.median_s - base.median_s,
                "KV stall share": decode.kv_stall_s / whole_s, "expert stall share": decode.expert_stall_s / whole_s,
                "KV read GB": decode.kv_nbytes / len(decode.seconds) / 1e9, "hit rate": decode.hit_rate,
                "hit rate of the steps that parts begin with": base.hit_rate,
            }
        )  # fmt: skip
        known = [("profile", expected), *(("profile at the moment's speeds", one) for one in expected_now)]
        for basis, one in known:
            row = {name: 1e3 * seconds for name, seconds in one.terms.as_dict().items() if seconds}
            report.tables.setdefault("ms of a token as the plan expects them", []).append({"basis": basis, **row})
        for whose, ratio in (
            ("the plan's", decode.median_s / expected.seconds), ("the plan's at the moment's speeds", off_now),
            ("from parts", off_parts),
        ):  # fmt: skip
            what = f"KV in RAM {stats.kv.ram_nbytes / 2**30:.1f} GiB: predicted tokens/s, {whose}, off by"
            report.target(what, abs(ratio - 1), "at most", 0.1)
    finally:
        runtime.close()


def _expected(
    prepared: PreparedRandom, profile: HardwareProfile, scale: KvModelScale, kv: KvChoice
) -> PassPrediction:  # fmt: skip
    """What the planner says of decoding with the context full."""
    workload = replace(prepared.plan.workload, prompt_tokens=scale.context, new_tokens=scale.new_tokens)
    prediction = make_plan(prepared.spec, workload, scale.ram_nbytes, profile, kv=kv).prediction
    assert prediction is not None
    return prediction.decode


def _at_this_moment(profile: HardwareProfile, prepared: PreparedRandom, root: Path) -> HardwareProfile:
    """The profile at the speeds that a probe finds, reads of the model's own experts among them."""
    plan = prepared.plan
    store = catalog.find(root, prepared.bundles.identity, plan.format)
    assert store is not None, "the model has been loaded"
    block = min(plan.slot_nbytes, plan.read_chunk_nbytes)
    with RuntimeSubjects(FileReads(store.shard_paths), root, repeats=0) as subjects:
        return profile.with_speeds(probe(subjects, profile, QUANT, block, plan.reader_threads))


def _all_of(turns: Sequence[_Decoded]) -> _Decoded:
    """What turns of decode add up to."""
    return _Decoded(
        [one for turn in turns for one in turn.seconds],
        sum(turn.kv_stall_s for turn in turns),
        sum(turn.kv_nbytes for turn in turns),
        sum(turn.expert_stall_s for turn in turns),
        statistics.mean(turn.hit_rate for turn in turns),
    )


def _from_parts_s(decode: _Decoded, base: _Decoded, plan: Plan, scale: KvModelScale, directory: Path) -> float:
    """A step with next to no context, plus the longer of the cold blocks' reads and of attention to the rest."""
    assert plan.kv is not None
    attention_bytes_per_s, disk_bytes_per_s = _speeds(directory, scale)
    attention_s = plan.kv.nbytes_per_token * (scale.context - _BASE_TOKENS) / attention_bytes_per_s
    return base.median_s + max(attention_s, decode.kv_nbytes / len(decode.seconds) / disk_bytes_per_s)


def _long_cache(model: PreTrainedModel, tokens: int) -> DynamicCache:
    """A cache of random keys and values, filled through the layers themselves."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([[1, 2]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        assert isinstance(layer, PagedLayer) and layer.table is not None
        layout = layer.table.layouts.plain
        shape = 1, layout.kv_heads, CHUNK_TOKENS, layout.key_width
        keys, values = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(2))
        while layer.table.tokens < tokens:
            count = min(CHUNK_TOKENS, tokens - layer.table.tokens)
            layer.table.append(keys[:, :, :count], values[:, :, :count])
    return cache


def _decode(
    model: PreTrainedModel, cache: DynamicCache, shape: checkpoints.Shape, count: int, seed: int
) -> _Decoded:  # fmt: skip
    runtime: Any = model.offload
    tokens = checkpoints.random_tokens(count + 2, shape.vocab, seed)
    for token in tokens[:2]:
        model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    before, seconds = runtime.stats(), []
    for token in tokens[2:]:
        start = perf_counter()
        model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        seconds.append(perf_counter() - start)
    after = runtime.stats()
    hits, misses = after.hits - before.hits, after.misses - before.misses
    return _Decoded(
        seconds,
        after.kv.read_stall_s - before.kv.read_stall_s + after.kv.write_stall_s - before.kv.write_stall_s,
        after.kv.bytes_read - before.kv.bytes_read,
        after.read_stall_s - before.read_stall_s,
        hits / max(1, hits + misses),
    )


def _speeds(directory: Path, scale: KvModelScale) -> tuple[float, float]:
    """Bytes per second of attention in RAM and of reads of segments, apart from the model."""
    query = torch.randn(1, HEADS, 1, WIDTH, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    nbytes, found = 0, []
    # With room for all; with room for all segments that are read at once, and about as much on disk as in the model.
    for room in (320 << 20, 100 << 20):
        pool = BlockPool(HostDevice(), room, SpillFile(directory))
        pool.stage(SETTINGS, one_layer(pool, "bf16").layouts.plain.nbytes)
        table = one_layer(pool, _FORMAT)
        fill(table, scale.context)
        nbytes = sum(int(pool.records.sizes[block]) for block in table.blocks(0, 0, table.columns))
        before = pool.staging.bytes_read
        seconds, _ = timed(lambda table=table: attend_in_place(table, query, 0.1), 3)  # type: ignore[misc]
        read = (pool.staging.bytes_read - before) / 5
        found.append((read if read else nbytes) / Spread.of(seconds).median)
        pool.close()
    return found[0], found[1]


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
