"""`python -m benchmarks`: equality first, then figures with their spread and the share of the limit."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

if TYPE_CHECKING:
    from benchmarks.harness import Report

NAMES = (
    "disk", "decode", "load", "step", "memory", "formats", "quality", "kernels", "llama_cpp", "llama_cpp_mixtral",
    "llama_cpp_large", "overhead", "large_model", "plan_accuracy", "gpu", "gpu_kernels", "gpu_steps", "gpu_models",
    "cache_policies", "decision_cost", "prefetch", "ablation", "kv_kernels", "decode_attention", "simulator", "kv",
    "kv_model", "kv_quality", "kv_prefix", "kv_sparsity", "compiling", "trace_hits", "replayed_steps",
)  # fmt: skip
_PARTS = ("gpu_kernels", "gpu_steps", "gpu_models")
"""Of another one."""


def _benchmarks(quick: bool) -> dict[str, Callable[[Path], Report]]:
    from benchmarks import (
        ablation,
        cache_policies,
        checkpoints,
        compiling,
        decision_cost,
        decode,
        decode_attention,
        disk,
        formats,
        gpu,
        kernels,
        kv,
        kv_kernels,
        kv_model,
        kv_prefix,
        kv_quality,
        kv_sparsity,
        large_model,
        llama_cpp,
        llama_cpp_large,
        load,
        memory,
        overhead,
        plan_accuracy,
        prefetch,
        quality,
        replayed_steps,
        simulator,
        step,
        trace_hits,
    )

    shape = checkpoints.QUICK if quick else checkpoints.FULL
    return {
        "disk": lambda work: disk.run(work, shape, disk.QUICK if quick else disk.FULL),
        "decode": lambda work: decode.run(work, shape, decode.QUICK if quick else decode.FULL),
        "load": lambda work: load.run(work, shape, load.QUICK if quick else load.FULL),
        "step": lambda work: step.run(work, shape, step.QUICK if quick else step.FULL),
        "memory": lambda work: memory.run(work, shape, memory.QUICK if quick else memory.FULL),
        "formats": lambda work: formats.run(formats.QUICK if quick else formats.FULL),
        "quality": lambda work: quality.run(work, quality.QUICK if quick else quality.FULL),
        "gpu": lambda work: gpu.run(work, gpu.QUICK if quick else gpu.FULL),
        "gpu_kernels": lambda work: gpu.run(work, gpu.QUICK if quick else gpu.FULL, ("kernels",)),
        "gpu_steps": lambda work: gpu.run(work, gpu.QUICK if quick else gpu.FULL, ("steps",)),
        "gpu_models": lambda work: gpu.run(work, gpu.QUICK if quick else gpu.FULL, ("models",)),
        "kernels": lambda work: kernels.run(kernels.QUICK if quick else kernels.FULL),
        "overhead": lambda work: overhead.run(
            work, shape if quick else overhead.LAYER_OF_30B, overhead.QUICK if quick else overhead.FULL
        ),
        "plan_accuracy": lambda work: plan_accuracy.run(work, plan_accuracy.QUICK if quick else plan_accuracy.FULL),
        "large_model": lambda work: large_model.run(
            work, shape if quick else large_model.LIKE_30B_A3B, large_model.QUICK if quick else large_model.FULL
        ),
        "cache_policies": lambda work: cache_policies.run(cache_policies.QUICK if quick else cache_policies.FULL),
        "decision_cost": lambda work: decision_cost.run(work, decision_cost.QUICK if quick else decision_cost.FULL),
        "ablation": lambda _work: ablation.run(ablation.QUICK if quick else ablation.FULL),
        "prefetch": lambda work: prefetch.run(work, prefetch.QUICK if quick else prefetch.FULL),
        "kv_kernels": lambda work: kv_kernels.run(kv_kernels.QUICK if quick else kv_kernels.FULL),
        "decode_attention": lambda _work: decode_attention.run(
            decode_attention.QUICK if quick else decode_attention.FULL
        ),
        "simulator": lambda work: simulator.run(simulator.QUICK if quick else simulator.FULL),
        "kv": lambda work: kv.run(work, kv.QUICK if quick else kv.FULL),
        "kv_model": lambda work: kv_model.run(
            work, shape if quick else large_model.LIKE_30B_A3B, kv_model.QUICK if quick else kv_model.FULL
        ),
        "trace_hits": lambda _work: trace_hits.run(trace_hits.QUICK if quick else trace_hits.FULL),
        "compiling": lambda work: compiling.run(work, compiling.QUICK if quick else compiling.FULL),
        "replayed_steps": lambda work: replayed_steps.run(
            work,
            replace(shape, dtype="float32") if quick else replayed_steps.NARROW,
            replayed_steps.QUICK if quick else replayed_steps.FULL,
        ),
        "kv_quality": lambda work: kv_quality.run(work, kv_quality.QUICK if quick else kv_quality.FULL),
        "kv_sparsity": lambda work: kv_sparsity.run(work, kv_sparsity.QUICK if quick else kv_sparsity.FULL),
        "kv_prefix": lambda work: kv_prefix.run(
            work,
            shape if quick else replace(overhead.LAYER_OF_30B, layers=1),
            kv_prefix.QUICK if quick else kv_prefix.FULL,
        ),
        "llama_cpp": lambda work: llama_cpp.run(work, shape, llama_cpp.QUICK if quick else llama_cpp.FULL),
        "llama_cpp_large": lambda work: llama_cpp_large.run(
            work,
            shape if quick else large_model.LIKE_30B_A3B,
            llama_cpp_large.QUICK if quick else llama_cpp_large.FULL,
        ),
        "llama_cpp_mixtral": lambda work: llama_cpp.run(
            work, shape if quick else checkpoints.LIKE_MIXTRAL, llama_cpp.QUICK if quick else llama_cpp.FULL
        ),
    }


@click.command(context_settings={"show_default": True})
@click.argument("name", type=click.Choice([*NAMES, "all"]), default="all")
@click.option("--quick", is_flag=True, help="A small model and few repeats: does it run? Its figures mean little.")
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".bench"),
    help="Checkpoints and stores; on the disk to be measured, with 30 GB of room.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the results go; otherwise, unless --quick, into benchmarks/results.",
)
def main(name: str, quick: bool, work: Path, json_file: Path | None) -> None:
    """Measure the runtime beside its peers, with a random-weight Qwen3-MoE of 5 GB that is written once.

    Nothing is reported unless results are equal. Exit codes: 0 measured, whether or not targets are met; 1 results
    are not equal, or it failed.
    """
    from benchmarks.harness import GateError
    from benchmarks.machine import provenance
    from benchmarks.report import RESULTS, show, write_json

    # Without this, being terminated leaves temporary stores and processes behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console() if sys.stdout.isatty() else Console(width=140)
    work.mkdir(parents=True, exist_ok=True)
    reports: list[Report] = []
    benchmarks = _benchmarks(quick)
    for chosen in [one for one in NAMES if one not in _PARTS] if name == "all" else [name]:
        origin = provenance(f"python -m benchmarks {chosen}{' --quick' if quick else ''}")
        try:
            report = benchmarks[chosen](work.absolute())
        except GateError as error:
            raise click.ClickException(f"not equal, so not measured: {error}") from error
        show(report, console)
        reports.append(report)
        if json_file is not None:
            write_json(json_file, {**origin, "command": f"python -m benchmarks {name}"}, reports)
        elif not quick:
            write_json(RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{chosen}.json", origin, [report])


if __name__ == "__main__":
    main()
