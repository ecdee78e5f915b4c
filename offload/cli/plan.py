"""`offload plan`: what would go where, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offload.cli.errors import exit_codes
from offload.cli.options import Size, example, json_option, model_options
from offload.cli.output import add_row, facts, table, write
from offload.sizes import format_size

if TYPE_CHECKING:
    from offload.cli.plan_ahead import Ahead
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
        "offload plan ./Mixtral-8x7B --gpu rtx4090 --machine-ram 64GiB --quant int4 --html report.html",
    ),
)
@model_options
@json_option
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at once.")
@click.option("--prompt", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of the prompt.")
@click.option("--gpu", metavar="NAME", help="Plan for this GPU by its datasheet, as rtx4090.")
@click.option("--link", metavar="NAME", help="Its link, as pcie4.  [default: the GPU's own]")
@click.option("--cpu", metavar="NAME", help="Plan for this class of processors, as ddr5-desktop.")
@click.option("--drive", metavar="NAME", help="Plan for this class of drives, as gen4.")
@click.option("--machine-ram", type=Size(), metavar="SIZE", help="Memory of the machine that is planned for.")
@click.option(
    "--vram", type=Size(), metavar="SIZE", help="Most memory of the GPU.  [default: all but what others need]"
)
@click.option("--skew", type=click.FloatRange(0, 10), help="Popularity of experts: rank^-SKEW.  [default: all alike]")
@click.option("--what-if", multiple=True, metavar="CHANGE", help="Also with ram=+32GiB, nvme=gen5, gpu=rtx5090 ...")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a report.")
def plan_command(as_json: bool, **options: Any) -> None:
    """Show what `run` would put where for MODEL, a directory or a Hub id that was downloaded, and how fast it would be.

    Reads the checkpoint's headers, no weights; creates and changes nothing. Exit code 3 where it does not fit. With the
    options from --gpu on it plans for a machine of these parts, from the model's config.json alone.
    """
    from offload.cli.plan_ahead import Ahead

    names = ("gpu", "link", "cpu", "drive", "machine_ram", "vram", "skew", "what_if", "html")
    ahead = Ahead(**{name: options.pop(name) for name in names})
    batch, prompt = options.pop("batch"), options.pop("prompt")
    with exit_codes(as_json=as_json):
        if ahead.asked:
            _plan_ahead(ahead, batch, prompt, as_json=as_json, **options)
        else:
            _plan(batch=batch, prompt=prompt, as_json=as_json, **options)


def _plan_ahead(
    ahead: Ahead,
    batch: int,
    prompt: int,
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
    from offload.cli.plan_ahead import make_rig, plan_ahead, read_spec
    from offload.request import DEFAULT_CONTEXT_TOKENS, PREFILL_CHUNK_TOKENS, store_root
    from placement.workload import Workload

    tokens = context or DEFAULT_CONTEXT_TOKENS
    spec = read_spec(model, revision, quant, dtype, tokens, trust_remote_code=trust_remote_code)
    rig = make_rig(ahead, ram, store_root(nvme))
    plan_ahead(spec, rig, Workload(tokens, batch, PREFILL_CHUNK_TOKENS, prompt), ahead, as_json=as_json)


def _plan(
    *,
    batch: int,
    prompt: int,
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
    from offload.preparation import known_profile, prepare_checkpoint
    from offload.request import PREFILL_CHUNK_TOKENS, make_request
    from placement.planner import make_plan

    request = make_request(
        ram=ram, nvme=nvme, context=context, batch=batch, prefill_chunk=PREFILL_CHUNK_TOKENS, max_memory=None,
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
    if prompt != made.workload.prompt_tokens:
        workload = replace(made.workload, prompt_tokens=prompt)
        made = make_plan(prepared.spec, workload, request.ram_nbytes, known_profile(prepared.spec, request))
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
                "expected": _expected(plan),
                "on top of the peak": f"interpreter and libraries, about {format_size(_own_nbytes())}",
            }
        ),
    )


def _expected(plan: Plan) -> str:
    if plan.prediction is None:
        return "unknown: run `offload profile` once, and speed is predicted"
    parts = []
    for name, one in (("decode", plan.prediction.decode), ("prefill", plan.prediction.prefill)):
        slow, fast = one.tokens_per_s_range
        terms = sorted(one.terms.as_dict().items(), key=lambda term: -term[1])[:3]
        shares = ", ".join(f"{term} {seconds / one.seconds:.0%}" for term, seconds in terms)
        parts.append(f"{name} {one.tokens_per_s:.2f} tokens/s ({slow:.2f} to {fast:.2f}; {shares})")
    return f"{'; '.join(parts)}; {plan.prediction.routing}"


def _own_nbytes() -> int:
    """What this process takes with all imported that a run imports."""
    import offload.assembly  # noqa: F401
    from profiler.memory import process_rss_nbytes

    return process_rss_nbytes()
