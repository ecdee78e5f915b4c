"""Seconds that the first load of a model takes where no kernel was ever compiled, and later loads do not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.harness import Report, Row, Spread, say
from benchmarks.machine import REPOSITORY
from benchmarks.peers import Process
from benchmarks.scratch import scratch_directory

_MODEL = REPOSITORY / "examples" / "tiny_moe" / "model"
_RAM = "56MiB"
_CONTEXT_TOKENS = 512
_PROMPT_TOKENS, _NEW_TOKENS = 40, 8


@dataclass(frozen=True)
class CompilingScale:
    """How much.

    Attributes:
        formats: of whole models; None is the checkpoint's bf16.
        rounds: each with an empty cache.
    """

    formats: tuple[str | None, ...]
    rounds: int


FULL = CompilingScale((None, "int4", "fp8_e4m3"), rounds=2)
QUICK = CompilingScale((None,), rounds=1)


def run(work: Path, scale: CompilingScale) -> Report:
    """The benchmark."""
    report = Report("compiling")
    rows: list[Row] = []
    for format in scale.formats:
        first, later = [], []
        for turn in range(scale.rounds):
            say(f"{format or 'bf16'}, round {turn + 1} of {scale.rounds}")
            with scratch_directory(work) as scratch:
                first.append(_in_a_process(scratch, format))
                later.append(_in_a_process(scratch, format))
            report.gate("same tokens", first[-1]["tokens"] == later[-1]["tokens"], f"{format}, round {turn + 1}")
            report.gate("later loads compile nothing", later[-1]["compiled"] == 0, f"{later[-1]['compiled']} functions")
        row: Row = {"format": format or "bf16", "functions": first[0]["compiled"]}
        for name, loads in (("first", first), ("later", later)):
            row[f"{name} load s"] = Spread.of([load["load_s"] for load in loads])
            row[f"{name} prompt and {_NEW_TOKENS} tokens s"] = Spread.of([load["generate_s"] for load in loads])
        rows.append(row)
        if format is None:
            seconds = Spread.of([load["load_s"] for load in first]).median
            report.target("first load, nothing compiled before", seconds, "at most", 60)
    report.tables["Loading the tiny trained model"] = rows
    report.notes.append(
        "Each load runs in a fresh process, without its imports; for a first one the cache of compiled kernels and the "
        "expert store are empty. Two processes compile; functions are those that the loading one did."
    )
    return report


def _in_a_process(scratch: Path, format: str | None) -> dict[str, Any]:
    with Process({"NUMBA_CACHE_DIR": str(scratch / "kernels")}) as process:
        result: dict[str, Any] = process.call("first_load", store=str(scratch / "store"), format=format)
        return result


def first_load(store: str, format: str | None) -> dict[str, Any]:
    """In a process of its own: load, and generate a few tokens."""
    import torch

    import offload
    from cpu_kernels.compiling.kept import KeptFunctions

    started = perf_counter()
    model: Any = offload.load(_MODEL, ram=_RAM, nvme=store, context=_CONTEXT_TOKENS, quant=format, progress=False)
    loaded = perf_counter()
    ids = torch.arange(_PROMPT_TOKENS)[None] + 1
    tokens = model.generate(ids, max_new_tokens=_NEW_TOKENS, do_sample=False)
    ended = perf_counter()
    model.offload.close()
    return {
        "load_s": loaded - started,
        "generate_s": ended - loaded,
        "compiled": KeptFunctions.compiled,
        "tokens": tokens.tolist(),
    }
