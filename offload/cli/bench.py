"""`offload bench`: run a model and put predicted beside measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from offload.cli.errors import exit_codes
from offload.cli.options import (
    device_options,
    example,
    json_option,
    model_options,
    prefill_chunk_option,
    progress_option,
    routing_options,
)
from offload.cli.output import add_row, table, write, write_json

if TYPE_CHECKING:
    from offload.bench import Amount, Bench
    from offload.runtime import Runtime


@click.command(
    "bench",
    short_help="Run a model, and put predicted beside measured.",
    epilog=example("offload profile", "offload bench ./Qwen3-30B-A3B --ram 16GiB --quant int4"),
)
@model_options
@prefill_chunk_option
@device_options
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at once.")
@click.option("--prompt", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of each prompt.")
@click.option("-n", "--new-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Tokens decoded.")
@click.option("--prompts", type=click.IntRange(min=1), default=3, show_default=True, help="Prompts measured.")
@click.option("--probe/--no-probe", default=True, help="Stream memory before, and scale the profile.  [default: probe]")
@routing_options
@json_option
@progress_option
def bench_command(as_json: bool, **options: Any) -> None:
    """Load MODEL, a directory or a Hub id, run it on random tokens, and put predicted beside measured, term by term.

    Predictions need a profile of this machine: run `offload profile` once. Random tokens spread over experts more
    evenly than text does. Exit codes are those of `run`: 0 says that it was measured, whatever the error is.
    """
    with exit_codes(as_json=as_json):
        _bench(as_json=as_json, **options)


def _bench(
    *,
    as_json: bool,
    model: str,
    ram: int | None,
    nvme: Path | None,
    context: int | None,
    dtype: str,
    quant: str | dict[str, str | None] | None,
    kv: str,
    kv_ram: int | None,
    kv_sparsity: str | None,
    revision: str | None,
    trust_remote_code: bool,
    prefill_chunk: int | str,
    device: str | None,
    vram: int | None,
    batch: int,
    prompt: int,
    new_tokens: int,
    prompts: int,
    probe: bool,
    skew: float | None,
    trace: Path | None,
    progress: bool | None,
) -> None:
    from offload.bench import Amount, run_bench
    from offload.cli.libraries import quiet_transformers
    from offload.errors import InvalidArgumentError
    from offload.loading import load
    from offload.preparation import profiles_for
    from offload.request import store_root
    from offload.traces import read_routing
    from profiler.memory import reset_peak_rss

    amount = Amount(batch, prompt, new_tokens, prompts)
    if context is not None and context < amount.context_tokens:
        raise InvalidArgumentError(
            f"--context {context}: this runs sequences of {amount.context_tokens} tokens; give that or more, or fewer "
            "tokens with --prompt and -n"
        )
    # What the process held at most before is none of the model's.
    reset_peak_rss()
    with quiet_transformers():
        loaded = load(
            model, ram=ram, nvme=nvme, dtype=dtype, quant=quant, kv=kv, kv_ram=kv_ram, kv_sparsity=kv_sparsity,
            context=context or amount.context_tokens, batch=batch, prefill_chunk=prefill_chunk, revision=revision,
            trust_remote_code=trust_remote_code, device=device, vram=vram, progress=progress,
        )  # fmt: skip
        runtime = cast("Runtime", loaded.offload)
        with runtime:
            routing = read_routing(runtime.spec, skew, trace)
            found = run_bench(loaded, amount, profiles_for(store_root(nvme))(runtime.spec), routing, probe=probe)
    if as_json:
        write_json(_report(found, amount))
    else:
        _write(found, amount)


def _report(found: Bench, amount: Amount) -> dict[str, Any]:
    return {
        **found.reconciliation.as_dict(),
        "batch": amount.batch,
        "prompt_tokens": amount.prompt_tokens,
        "new_tokens": amount.new_tokens,
        "stream_bytes_per_s": found.stream_bytes_per_s,
        "prefill": found.prefill.as_dict(),
        "decode": found.decode.as_dict(),
        "plan": json.loads(found.plan.to_json()),
    }


def _write(found: Bench, amount: Amount) -> None:
    rows = table("", "predicted", "measured", "error", numbers=("predicted", "measured", "error"))
    for line in found.reconciliation.lines:
        add_row(rows, *line.cells)
    notes = list(found.reconciliation.notes)
    if found.stream_bytes_per_s is not None:
        notes.append(f"scaled to memory that streamed at {found.stream_bytes_per_s / 1e9:.1f} GB/s right before")
    notes.append(f"{amount.prompts} prompts and {amount.new_tokens} new tokens of each sequence, all random")
    write(f"{found.reconciliation.model}\n", rows, "", *notes)
