"""`offload plan`: what would go where, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offload.cli.errors import exit_codes
from offload.cli.options import Size, example, json_option, model_options, prefill_chunk_option, routing_options
from offload.cli.output import add_row, facts, kv_in_words, table, write
from offload.cli.simulation import Simulate, simulation_options, write_plan_json, write_simulation
from offload.plan_words import formats_in_words
from offload.sizes import format_size

if TYPE_CHECKING:
    from offload.cli.plan_ahead import Ahead
    from offload.remote import RemoteModel
    from placement.hardware_profile import HardwareProfile
    from placement.model_spec import ModelSpec
    from placement.plan import Plan
    from placement.predict import Routing
    from placement.prediction import PassPrediction


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
        "offload plan Qwen/Qwen3-30B-A3B --remote --ram 16GiB --quant int4",
        "offload plan ./Qwen3-30B-A3B --ram 16GiB --trace text.trace --simulate --timeline timeline.json",
    ),
)
@model_options
@prefill_chunk_option
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
@click.option("--what-if", multiple=True, metavar="CHANGE", help="Also with ram=+32GiB, nvme=gen5, gpu=rtx5090 ...")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a report.")
@routing_options
@click.option("--remote", is_flag=True, help="MODEL is on the Hub: read its headers there, and download nothing.")
@simulation_options
def plan_command(as_json: bool, **options: Any) -> None:
    """Show what `run` would put where for MODEL, a directory or a Hub id that was downloaded, and how fast it would be.

    Reads the checkpoint's headers, no weights; creates and changes nothing. Exit code 3 where it does not fit. With the
    options from --gpu to --html and --skew it plans for a machine of these parts, from the model's config.json alone.
    """
    from offload.cli.plan_ahead import Ahead
    from offload.written_files import check_place

    names = ("gpu", "link", "cpu", "drive", "machine_ram", "vram", "what_if", "html")
    ahead = Ahead(**{name: options.pop(name) for name in names})
    with exit_codes(as_json=as_json):
        asked = Asked(as_json=as_json, simulate=Simulate.asked(options), **options)
        check_place(ahead.html)
        check_place(None if asked.simulate is None else asked.simulate.timeline)
        elsewhere = ahead.asked or asked.skew is not None or asked.remote
        of_kv = asked.kv != "auto" or asked.kv_ram is not None or asked.kv_sparsity is not None
        if of_kv and asked.remote:
            raise click.UsageError("--kv, --kv-ram and --kv-sparsity go with a model that is here.")
        if asked.prefill_chunk == "auto" and elsewhere:
            raise click.UsageError("--prefill-chunk auto goes with a plan for this machine and a model that is here.")
        if ahead.asked or asked.skew is not None:
            _plan_ahead(ahead, asked)
        elif asked.remote:
            _plan_remote(asked)
        else:
            _plan(asked)


@dataclass(frozen=True)
class Asked:
    """The options of every plan; see the help texts."""

    model: str
    ram: int | None
    nvme: Path | None
    context: int | None
    dtype: str
    quant: str | dict[str, str | None] | None
    kv: str
    kv_ram: int | None
    kv_sparsity: str | None
    revision: str | None
    trust_remote_code: bool
    prefill_chunk: int | str
    batch: int
    prompt: int
    skew: float | None
    trace: Path | None
    remote: bool
    simulate: Simulate | None
    as_json: bool

    @property
    def chunk_tokens(self) -> int:
        """Of a plan that is not for this machine, whose chunk is a number."""
        assert isinstance(self.prefill_chunk, int)
        return self.prefill_chunk

    def read_remote(self, context: int) -> RemoteModel:
        """The model on the Hub."""
        from offload.cli.libraries import quiet_transformers
        from offload.quantisation import make_quantisation
        from offload.remote import read_remote

        with quiet_transformers():
            return read_remote(
                self.model, make_quantisation(self.quant), context_tokens=context, dtype=self.dtype,
                revision=self.revision, trust_remote_code=self.trust_remote_code,
            )  # fmt: skip


def _plan_ahead(ahead: Ahead, asked: Asked) -> None:
    from offload.cli.plan_ahead import make_rig, plan_ahead, read_specs
    from offload.request import DEFAULT_CONTEXT_TOKENS, kv_choice, store_root
    from offload.traces import read_routing
    from placement.kv import KvChoice
    from placement.workload import Workload

    tokens = asked.context or DEFAULT_CONTEXT_TOKENS
    if asked.remote:
        specs = asked.read_remote(tokens).specs
    else:
        specs = read_specs(
            asked.model, asked.revision, asked.quant, asked.dtype, tokens, trust_remote_code=asked.trust_remote_code
        )
    rig = make_rig(ahead, asked.ram, store_root(asked.nvme))
    kv = kv_choice(asked.kv, asked.kv_ram, asked.kv_sparsity)
    if kv != KvChoice():
        # As `offload.load` has it without `kv_vram=`: as many of the newest blocks in VRAM as there is room for.
        rig = replace(rig, kv=replace(kv, vram_nbytes=None))
    routing = read_routing(specs[0], asked.skew, asked.trace)
    workload = Workload(tokens, asked.batch, asked.chunk_tokens, asked.prompt)
    plan_ahead(specs, rig, workload, ahead, routing, asked.simulate, as_json=asked.as_json)


def _plan_remote(asked: Asked) -> None:
    from offload.errors import DoesNotFitError
    from offload.format_choice import fastest_format
    from offload.preparation import profiles_for
    from offload.request import DEFAULT_CONTEXT_TOKENS, make_request
    from offload.traces import read_routing
    from placement.planner import PlanInfeasibleError, make_plan
    from placement.workload import Workload

    request = make_request(
        ram=asked.ram, nvme=asked.nvme, context=asked.context, batch=asked.batch, prefill_chunk=asked.prefill_chunk,
        max_memory=None, quant=asked.quant,
    )  # fmt: skip
    found = asked.read_remote(asked.context or DEFAULT_CONTEXT_TOKENS)
    tokens = asked.context or min(DEFAULT_CONTEXT_TOKENS, found.specs[0].max_context_tokens)
    workload = Workload(tokens, asked.batch, asked.chunk_tokens, asked.prompt)
    routing = read_routing(found.specs[0], asked.skew, asked.trace)

    profile_for = profiles_for(request.store_root)

    def planned(spec: ModelSpec) -> Plan:
        try:
            return make_plan(spec, workload, request.ram_nbytes, profile_for(spec), routing)
        except PlanInfeasibleError as error:
            raise DoesNotFitError(str(error), minimum_ram_bytes=error.minimum_ram_nbytes) from error

    best, made = fastest_format(found.specs, planned)
    spec = found.specs[best]
    free = _free_nbytes(request.store_root)
    state = f"none yet; written by the first run, after a download of {format_size(found.download_nbytes)}"
    disk = Disk(request.store_root, free, state, present=False)
    _finish(made, disk, spec, profile_for(spec), routing, asked)


def _plan(asked: Asked) -> None:
    from offload.cli.libraries import quiet_transformers
    from offload.errors import CheckpointNotFoundError
    from offload.preparation import prepare_checkpoint
    from offload.request import make_request
    from offload.traces import read_routing
    from placement.planner import make_plan

    request = make_request(
        ram=asked.ram, nvme=asked.nvme, context=asked.context, batch=asked.batch, prefill_chunk=asked.prefill_chunk,
        max_memory=None, quant=asked.quant, kv=asked.kv, kv_ram=asked.kv_ram, kv_sparsity=asked.kv_sparsity,
    )  # fmt: skip
    try:
        with quiet_transformers():
            prepared = prepare_checkpoint(
                asked.model,
                request,
                dtype=asked.dtype,
                revision=asked.revision,
                local_files_only=True,
                trust_remote_code=asked.trust_remote_code,
            )
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(f"{error} `offload plan` downloads nothing.") from error
    prepared.checkpoint.close()
    made = prepared.plan
    routing = read_routing(prepared.spec, asked.skew, asked.trace)
    profile = prepared.profile
    if asked.prompt != made.workload.prompt_tokens or routing is not None:
        workload = replace(made.workload, prompt_tokens=asked.prompt)
        options = made.format_options
        made = make_plan(prepared.spec, workload, request.ram_nbytes, profile, routing, kv=request.kv)
        made = replace(made, format_options=options)
    disk = _look_at_disk(request.store_root, prepared.bundles.identity, made)
    _finish(made, disk, prepared.spec, profile, routing, asked)


def _finish(
    made: Plan, disk: Disk, spec: ModelSpec, profile: HardwareProfile | None, routing: Routing | None, asked: Asked
) -> None:
    """Simulate, write, and refuse what the disk has no room for."""
    from offload.errors import DoesNotFitError

    lacking = not disk.present and disk.free_nbytes < made.disk_nbytes
    simulation = None if asked.simulate is None else asked.simulate.run(spec, profile, made)
    if not asked.as_json:
        _write(made, disk, _with_context_full(made, spec, profile, routing), given=asked.ram is not None)
        if simulation is not None:
            write_simulation(simulation, made)
    elif not lacking:
        write_plan_json(made, simulation)
    if lacking:
        raise DoesNotFitError(
            f"{disk.root}: the expert store needs {format_size(made.disk_nbytes)} of disk and "
            f"{format_size(disk.free_nbytes)} are free; free space there (`offload store ls` shows what stores take), "
            "or give a directory on another disk with --nvme",
            minimum_disk_bytes=made.disk_nbytes,
        )


def _free_nbytes(root: Path) -> int:
    from offload.machine_profile import existing
    from offload.store import files

    directory = existing(root)
    with files.storage_errors("reading", directory):
        return files.free_nbytes(directory)


def _look_at_disk(root: Path, identity: str, plan: Plan) -> Disk:
    from offload.errors import StoreCorruptError
    from offload.store import catalog

    free = _free_nbytes(root)
    try:
        store = catalog.find(root, identity, plan.format)
    except StoreCorruptError as error:
        return Disk(root, free, f"damaged: {error}", present=True)
    if store is None:
        return Disk(root, free, "none yet; written by the first run", present=False)
    return Disk(root, free, f"there: {store.path.name}", present=True)


def _with_context_full(made: Plan, spec: ModelSpec, profile: HardwareProfile | None, routing: Routing | None) -> str:
    """The expected speed of the context's last tokens, which attend to all others."""
    from placement.planner import predicted

    if made.prediction is None or profile is None:
        return "unknown"
    workload = replace(made.workload, prompt_tokens=made.workload.context_tokens)
    decode = predicted(spec, profile, made.ram_slots, workload, routing, made.kv).decode
    return f"decode {_speed(decode)}"


def _write(plan: Plan, disk: Disk, with_context_full: str, *, given: bool) -> None:
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
    if plan.expert_count:
        slots = f"{plan.ram_slots} expert slots of {format_size(plan.slot_nbytes)}"
        add_row(uses, slots, "ram", format_size(plan.ram.slot_nbytes))
    add_row(uses, "peak", "ram", format_size(plan.peak_ram_nbytes), style="bold")
    if plan.workload_peak_ram_nbytes < plan.peak_ram_nbytes:
        add_row(
            uses,
            f"expected peak, {work.prompt_tokens} and {work.new_tokens} new tokens",
            "ram",
            format_size(plan.workload_peak_ram_nbytes),
        )
    if plan.expert_count:
        uses.add_section()
        add_row(uses, f"all {plan.expert_count} experts", plan.expert_home, format_size(plan.expert_nbytes))
    source = "" if given else ", nine tenths of what is available"
    write(
        f"{plan.model}: {formats_in_words(plan)}\n",
        uses,
        "",
        facts(
            {
                "budget": f"{format_size(plan.ram_budget_nbytes)}{source}",
                "minimum": f"{format_size(plan.minimum_ram_nbytes)} (--ram {plan.minimum_ram_nbytes})",
                **{f"in {option.in_words}": option.speed_in_words for option in plan.format_options},
                **_of_experts(plan),
                "KV cache": kv_in_words(plan),
                **_of_store(plan, disk),
                "expected": _expected(plan),
                f"after {work.context_tokens} tokens": with_context_full,
                "on top of the peak": f"interpreter and libraries, about {format_size(_own_nbytes())}",
            }
        ),
    )


def _of_experts(plan: Plan) -> dict[str, str]:
    if not plan.expert_count:
        return {}
    share = f"{plan.ram_slots} of {plan.expert_count} ({plan.resident_fraction:.0%})"
    return {"experts in RAM": f"{share}; a token uses {plan.experts_per_token}"}


def _of_store(plan: Plan, disk: Disk) -> dict[str, str]:
    if not plan.expert_count:
        return {}
    needed = f"{format_size(plan.disk_nbytes)}; {format_size(disk.free_nbytes)} free in {disk.root}"
    return {"disk needed": needed, "store": disk.store}


def _expected(plan: Plan) -> str:
    if plan.prediction is None:
        return "unknown: run `offload profile` once, and speed is predicted"
    found = plan.prediction
    return f"decode {_speed(found.decode)}; prefill {_speed(found.prefill)}; {found.routing}"


def _speed(one: PassPrediction) -> str:
    slow, fast = one.tokens_per_s_range
    terms = sorted(one.terms.as_dict().items(), key=lambda term: -term[1])[:3]
    shares = ", ".join(f"{term} {seconds / one.seconds:.0%}" for term, seconds in terms)
    return f"{one.tokens_per_s:.2f} tokens/s ({slow:.2f} to {fast:.2f}; {shares})"


def _own_nbytes() -> int:
    """What this process takes with all imported that a run imports."""
    import offload.assembly  # noqa: F401
    from profiler.memory import process_rss_nbytes

    return process_rss_nbytes()
