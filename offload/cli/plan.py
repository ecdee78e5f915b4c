"""`offload plan`: what would go where, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offload.cli.errors import exit_codes
from offload.cli.options import example, json_option, model_options
from offload.cli.output import add_row, facts, table, write
from offload.sizes import format_size

if TYPE_CHECKING:
    from placement.plan import Plan


@dataclass(frozen=True)
class Disk:
    """What the store's directory has.

    Attributes:
        root: the directory of stores; need not exist.
        free_nbytes: free bytes of its file system.
        store: the state of the model's store, in words.
        present: a usable store is there, and nothing has to be written.
    """

    root: Path
    free_nbytes: int
    store: str
    present: bool


@click.command(
    "plan",
    short_help="Show what would go where, without loading.",
    epilog=example(
        "offload plan ./Qwen3-30B-A3B --ram 16GiB",
        "offload plan ./Qwen3-30B-A3B --ram 16GiB --json",
    ),
)
@model_options
@json_option
def plan_command(as_json: bool, **options: Any) -> None:
    """Show what `run` would put where for MODEL, a directory or a Hub id that was downloaded.

    Reads the checkpoint's headers, no weights; creates and changes nothing. Exit code 3 where it does not fit.
    """
    with exit_codes(as_json=as_json):
        _plan(as_json=as_json, **options)


def _plan(
    *,
    as_json: bool,
    model: str,
    ram: int | None,
    nvme: Path | None,
    context: int | None,
    dtype: str,
    quant: str | dict[str, str | None] | None,
    revision: str | None,
    trust_remote_code: bool,
) -> None:
    from offload.cli.libraries import quiet_transformers
    from offload.errors import CheckpointNotFoundError, DoesNotFitError
    from offload.preparation import prepare_checkpoint
    from offload.request import PREFILL_CHUNK_TOKENS, make_request

    request = make_request(
        ram=ram, nvme=nvme, context=context, batch=1, prefill_chunk=PREFILL_CHUNK_TOKENS, max_memory=None,
        quant=quant,
    )  # fmt: skip
    try:
        with quiet_transformers():
            prepared = prepare_checkpoint(
                model,
                request,
                dtype=dtype,
                revision=revision,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
            )
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(f"{error} `offload plan` downloads nothing.") from error
    prepared.checkpoint.close()
    made = prepared.plan
    disk = _look_at_disk(request.store_root, prepared.bundles.identity, made)
    lacking = not disk.present and disk.free_nbytes < made.disk_nbytes
    if not as_json:
        _write(made, disk, given=ram is not None)
    elif not lacking:
        click.echo(made.to_json())
    if lacking:
        raise DoesNotFitError(
            f"{disk.root}: the expert store needs {format_size(made.disk_nbytes)} of disk and "
            f"{format_size(disk.free_nbytes)} are free; free space there (`offload store ls` shows what stores take), "
            "or give a directory on another disk with --nvme",
            minimum_disk_bytes=made.disk_nbytes,
        )


def _look_at_disk(root: Path, identity: str, plan: Plan) -> Disk:
    from offload.errors import StoreCorruptError
    from offload.store import catalog, files

    existing = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    with files.storage_errors("reading", existing):
        free = files.free_nbytes(existing)
    try:
        store = catalog.find(root, identity, plan.format)
    except StoreCorruptError as error:
        return Disk(root, free, f"damaged: {error}", present=True)
    if store is None:
        return Disk(root, free, "none yet; written by the first run", present=False)
    return Disk(root, free, f"there: {store.path.name}", present=True)


def _write(plan: Plan, disk: Disk, *, given: bool) -> None:
    work = plan.workload
    uses = table("what", "where", "size", numbers=("size",))
    add_row(uses, "dense weights", plan.dense_tier, format_size(plan.ram.dense_nbytes))
    add_row(
        uses,
        f"KV cache of {work.context_tokens} tokens",
        plan.kv_tier,
        format_size(plan.ram.kv_nbytes),
    )
    prompt = min(work.prefill_chunk_tokens, work.context_tokens)
    add_row(uses, f"activations, {prompt} tokens at once", "ram", format_size(plan.ram.activation_nbytes))
    add_row(
        uses,
        f"{plan.ram_slots} expert slots of {format_size(plan.slot_nbytes)}",
        "ram",
        format_size(plan.ram.slot_nbytes),
    )
    add_row(uses, "peak", "ram", format_size(plan.peak_ram_nbytes), style="bold")
    uses.add_section()
    add_row(uses, f"all {plan.expert_count} experts", plan.expert_home, format_size(plan.expert_nbytes))
    source = "" if given else ", nine tenths of what is available"
    write(
        f"{plan.model}: {plan.model_type}, experts in {plan.format}, other linear layers in {plan.dense_format}, "
        f"output layer in {plan.head_format}\n",
        uses,
        "",
        facts(
            {
                "budget": f"{format_size(plan.ram_budget_nbytes)}{source}",
                "minimum": f"{format_size(plan.minimum_ram_nbytes)} (--ram {plan.minimum_ram_nbytes})",
                "experts in RAM": f"{plan.ram_slots} of {plan.expert_count} ({plan.resident_fraction:.0%}); "
                f"a token uses {plan.experts_per_token}",
                "KV cache": f"{format_size(plan.kv_nbytes_per_token)} per token",
                "disk needed": f"{format_size(plan.disk_nbytes)}; {format_size(disk.free_nbytes)} free in {disk.root}",
                "store": disk.store,
                "on top of the peak": f"interpreter and libraries, about {format_size(_own_nbytes())}",
            }
        ),
    )


def _own_nbytes() -> int:
    """What this process takes with all imported that a run imports."""
    import offload.assembly  # noqa: F401
    from profiler.memory import process_rss_nbytes

    return process_rss_nbytes()
