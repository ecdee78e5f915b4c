"""Seconds of the first load, which converts, and of later ones, against moving the same bytes with a plain loop."""

from __future__ import annotations

import random
import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from transformers import PreTrainedModel

from benchmarks import checkpoints
from benchmarks.equality import GATED_BUNDLES, gate_same_bits, stored_and_converted
from benchmarks.harness import Report, Row, Spread, interleave, ratios, say
from benchmarks.machine import evict
from benchmarks.peers import Process
from benchmarks.raw_io import COPY_BLOCK_NBYTES, Block, blocks_of, copy_files, read_blocks
from benchmarks.scratch import scratch_directory
from offload.store import ExpertStore, Progress, convert, list_stores, verify
from placement.plan import Plan

STAGES = ("plan", "convert", "dense", "preload", "rest")
RESIDENT = 0.25
_CONTEXT_TOKENS = 1024


@dataclass(frozen=True)
class LoadScale:
    """How often."""

    rounds: int


FULL = LoadScale(rounds=3)
QUICK = LoadScale(rounds=1)

Seconds = dict[str, float]


def run(work: Path, shape: checkpoints.Shape, scale: LoadScale) -> Report:
    """The benchmark; needs room for two stores."""
    report = Report("load")
    checkpoint = checkpoints.ensure_checkpoint(shape, work)
    root = checkpoints.store_root(work)
    prepared = checkpoints.prepare(checkpoint, None, _CONTEXT_TOKENS, root)
    with closing(prepared.checkpoint):
        store = convert(prepared.bundles, root)
        _gate(report, store, prepared.bundles)
    plan = prepared.plan
    with scratch_directory(work) as scratch:
        turns = interleave(
            {
                "ours": lambda: _ours(report, checkpoint, store, scratch),
                "raw": lambda: _raw(checkpoint, store, plan, scratch),
            },
            scale.rounds,
        )
    seconds = {name: [turn[name] for turn in side] for side in turns.values() for name in side[0] if "." not in name}
    moved = _moved_nbytes(checkpoint, plan)
    report.tables["Loading"] = [_row(name, raw, seconds, moved[name]) for name, raw in _RAW_OF.items()]
    report.tables["Stages of loading, seconds"] = [
        {
            "load": name,
            **{stage: Spread.of([turn[f"{name}.{stage}"] for turn in turns["ours"]]) for stage in STAGES},
        }
        for name in _RAW_OF
    ]
    report.tables["Plain loops, seconds"] = [
        {"loop": name, "seconds": Spread.of(seconds[name])} for name in seconds if name not in _RAW_OF
    ]
    for name in ("first", "later, all resident"):
        ratio = ratios(seconds[name], seconds[_RAW_OF[name]])
        report.target(f"{name} load / plain loop over the same bytes", ratio.median, "at most", 1.3)
    report.notes += [
        "Each load runs in a fresh process; imports are not counted. The checkpoint is evicted from the page cache "
        "before each; plain loops read and write with O_DIRECT in blocks of 16 MiB and fsync.",
        f"The first load and the later one without preloading have {RESIDENT:.0%} of the experts in RAM: their slots "
        "fill as experts are needed.",
    ]
    return report


_RAW_OF = {
    "first": "read and write overlapped",
    "later, all resident": "read store and dense weights into new memory",
    "later, partly resident": "read dense weights",
}


def _row(name: str, raw: str, seconds: dict[str, list[float]], nbytes: int) -> Row:
    return {
        "load": name,
        "MB moved": nbytes / 1e6,
        "seconds": Spread.of(seconds[name]),
        "plain loop s": Spread.of(seconds[raw]),
        "ours / loop": ratios(seconds[name], seconds[raw]),
    }


def _moved_nbytes(checkpoint: Path, plan: Plan) -> dict[str, int]:
    return {
        "first": checkpoints.weights_nbytes(checkpoint) + plan.expert_nbytes,
        "later, all resident": plan.expert_nbytes + plan.ram.dense_nbytes,
        "later, partly resident": plan.ram.dense_nbytes,
    }


def _gate(report: Report, store: ExpertStore, source: Any) -> None:
    problems = verify(store)
    report.gate("store verifies", not problems, f"{len(problems)} problems")
    bundles = [(group, expert) for group, layer in enumerate(store.groups) for expert in range(layer.count)]
    chosen = random.Random(0).sample(bundles, min(GATED_BUNDLES, len(bundles)))
    gate_same_bits(report, f"{len(chosen)} bundles", stored_and_converted(store, source, chosen))


def _ours(report: Report, checkpoint: Path, store: ExpertStore, scratch: Path) -> Seconds:
    """A first load into an empty directory, then two later ones; the new store is compared and removed."""
    root = scratch / "stores"
    budgets = {
        "first": checkpoints.budget_for(checkpoint, RESIDENT, _CONTEXT_TOKENS),
        "later, all resident": checkpoints.budget_for(checkpoint, 1.0, _CONTEXT_TOKENS),
        "later, partly resident": checkpoints.budget_for(checkpoint, RESIDENT, _CONTEXT_TOKENS),
    }
    seconds: Seconds = {}
    try:
        for name, ram in budgets.items():
            say(f"loading: {name}")
            evict(checkpoints.weight_files(checkpoint))
            with Process() as process:
                stages = process.call("load_stages", checkpoint=str(checkpoint), ram=ram, store=str(root))
            seconds[name] = sum(stages.values())
            seconds |= {f"{name}.{stage}": stages[stage] for stage in STAGES}
        (info,) = list_stores(root)
        bundles = {"new": ExpertStore.open(info.path).manifest.bundles, "first": store.manifest.bundles}
        report.gate("two conversions", bundles["new"] == bundles["first"], "the same checksums")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return seconds


def _raw(checkpoint: Path, store: ExpertStore, plan: Plan, scratch: Path) -> Seconds:
    say("plain loops")
    files = checkpoints.weight_files(checkpoint)
    shards = store.shard_paths
    unwritten = checkpoints.weights_nbytes(checkpoint) - plan.expert_nbytes
    copies = {
        name: copy_files(files, scratch / "copy", skipped_nbytes=unwritten, overlapped=overlapped)
        for name, overlapped in (("read and write overlapped", True), ("read and write in turn", False))
    }
    dense: list[Block] = []
    for block in blocks_of(files, COPY_BLOCK_NBYTES):
        missing = plan.ram.dense_nbytes - sum(taken.nbytes for taken in dense)
        if missing > 0:
            dense.append(Block(block.file, block.offset, min(block.nbytes, missing)))
    moved = [Block(block.file + len(shards), block.offset, block.nbytes) for block in dense]
    everything = [*blocks_of(shards, COPY_BLOCK_NBYTES), *moved]
    return {
        **copies,
        "read store and dense weights into new memory": read_blocks(
            [*shards, *files], everything, plan.reader_threads, keep=True
        ),
        "read store and dense weights into one buffer": read_blocks([*shards, *files], everything, plan.reader_threads),
        "read dense weights": read_blocks(files, dense, plan.reader_threads),
    }


class _Clock:
    """A progress bar that only looks at the time."""

    def __init__(self) -> None:
        self.seconds: Seconds = {}
        self._ends: Seconds = {}
        self._task = ""
        self._begin = 0.0

    def start(self, total_bytes: int, description: str) -> None:
        self._task, self._begin = description, perf_counter()

    def advance(self, nbytes: int) -> None:
        pass

    def finish(self) -> None:
        self._ends[self._task] = perf_counter()
        self.seconds[self._task] = self._ends[self._task] - self._begin

    def of(self, word: str) -> float:
        """Seconds of the tasks whose description has a word."""
        return sum(seconds for task, seconds in self.seconds.items() if word in task.lower().split())

    def end_of(self, word: str) -> float:
        """When the last of these tasks ended; 0 if there was none."""
        return max((end for task, end in self._ends.items() if word in task.lower().split()), default=0.0)


def load_stages(checkpoint: str, ram: int, store: str) -> Seconds:
    """Load as `offload.load` does and say where the time went; in a fresh process.

    Returns:
        Seconds of `STAGES`: headers and plan; conversion, with dense weights as far as they load beside it; dense
        weights after it; reading all experts; whatever else.
    """
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401 - imports are not timed

    from offload.assembly import assemble

    begin = perf_counter()
    prepared = checkpoints.prepare(Path(checkpoint), ram, _CONTEXT_TOKENS, Path(store))
    planned = perf_counter()
    finish = prepared.finish
    clock = _Clock()
    dense = (0.0, 0.0)

    def timed_finish(progress: Progress) -> PreTrainedModel:
        nonlocal dense
        before = perf_counter()
        model = finish(progress)
        dense = (before, perf_counter())
        return model

    prepared.finish = timed_finish  # type: ignore[method-assign]
    model: Any = assemble(prepared, Path(store), clock)
    end = perf_counter()
    model.offload.close()
    stages = {
        "plan": planned - begin,
        "convert": clock.of("converting"),
        "dense": max(0.0, dense[1] - max(dense[0], clock.end_of("converting"))),
        "preload": clock.of("experts"),
    }
    return {**stages, "rest": end - begin - sum(stages.values())}
