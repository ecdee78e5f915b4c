"""`offload plan` for machines and memory that the runtime does not use yet, or that are not here."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.cli.output import add_row, facts, kv_in_words, table, write
from offload.cli.simulation import Simulate, write_plan_json, write_simulation
from offload.errors import DoesNotFitError, InvalidArgumentError, UnsupportedModelError
from offload.plan_words import dense_in_words, formats_in_words
from offload.sizes import format_size, parse_size

if TYPE_CHECKING:
    from placement.model_spec import ModelSpec
    from placement.plan import Plan, RamUse, VramUse
    from placement.predict import Routing
    from placement.prediction import PassPrediction
    from placement.rig import Change, Rig
    from placement.workload import Workload


@dataclass(frozen=True)
class Ahead:
    """The options that plan ahead; see the help texts."""

    gpu: str | None
    link: str | None
    cpu: str | None
    drive: str | None
    machine_ram: int | None
    vram: int | None
    what_if: tuple[str, ...]
    html: Path | None

    @property
    def asked(self) -> bool:
        """Whether any of them was given."""
        return any(value not in (None, ()) for value in vars(self).values())


def read_specs(
    model: str, revision: str | None, quant: Any, dtype: str, context: int, *, trust_remote_code: bool
) -> tuple[ModelSpec, ...]:
    """The model's records from its config, local or in the Hub's cache: one for each format that it may be in."""
    import torch

    from offload.checkpoint.locate import locate_checkpoint
    from offload.checkpoint.quantised import take_encoding
    from offload.cli.libraries import quiet_transformers
    from offload.hf.config_spec import specs_of_config
    from offload.hf.dtypes import resolve_dtype
    from offload.hf.skeleton import config_dtype, read_config
    from offload.quantisation import make_quantisation

    directory = Path(model)
    if not (directory / "config.json").is_file():
        directory = locate_checkpoint(model, revision=revision, local_files_only=True)
    with quiet_transformers():
        config = read_config(directory, trust_remote_code=trust_remote_code)
        compute = resolve_dtype(dtype, config_dtype(config), torch.bfloat16)
        encoding = take_encoding(copy.deepcopy(config), str(directory / "config.json"))
        own = None if encoding is None else encoding.packed_format
        candidates = make_quantisation(quant).candidates(own)
        return specs_of_config(config, model, candidates, dtype=compute, context_tokens=context)


def make_rig(ahead: Ahead, ram: int | None, root: Path) -> Rig:
    """The machine of the options: from datasheets where a part is named, else as it was measured.

    Raises:
        InvalidArgumentError: an unknown part, or nothing measured and no part named.
    """
    from offload.machine_profile import cached_profile
    from placement.datasheets import DEFAULT_RAM_NBYTES, datasheet
    from placement.rig import Rig

    named: dict[str, Any] = {
        key: getattr(ahead, key) for key in ("gpu", "link", "cpu", "drive") if getattr(ahead, key) is not None
    }
    try:
        if named or ahead.machine_ram is not None:
            profile = datasheet(**named, ram_nbytes=ahead.machine_ram or DEFAULT_RAM_NBYTES)
        else:
            found = cached_profile(root)
            if found is None:
                raise InvalidArgumentError(
                    "this machine was not measured: run `offload profile`, or name parts with --gpu, --cpu, --drive"
                )
            profile = found
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from error
    vram = profile.gpu.memory_nbytes if profile.gpu else 0
    return Rig(profile, profile.cpu.memory_nbytes if ram is None else ram, vram if ahead.vram is None else ahead.vram)


def changed(rig: Rig, text: str) -> Rig:
    """The rig with a change such as "ram=+32GiB", "vram=16GiB" or "nvme=gen5"; several joined by commas.

    Raises:
        InvalidArgumentError: not such a change.
    """
    for entry in text.split(","):
        part, equals, value = entry.strip().partition("=")
        if not equals:
            raise InvalidArgumentError(f"--what-if {text!r}: expected part=value, such as ram=+32GiB or nvme=gen5")
        try:
            if part in ("ram", "vram"):
                nbytes = parse_size(value.removeprefix("+"), part)
                before = rig.ram_nbytes if part == "ram" else rig.vram_nbytes
                rig = rig.with_memory(**{part: before + nbytes if value.startswith("+") else nbytes})
            else:
                rig = rig.with_part(part, value)
        except ValueError as error:
            raise InvalidArgumentError(f"--what-if {text!r}: {error}") from error
    return rig


def plan_ahead(
    specs: Sequence[ModelSpec],
    rig: Rig,
    workload: Workload,
    ahead: Ahead,
    routing: Routing | None,
    simulate: Simulate | None,
    *,
    as_json: bool,
) -> None:
    """Plan in the best of the formats that the model may be in, and write what came of it.

    Raises:
        UnsupportedModelError: nothing can be predicted of it.
        InvalidArgumentError: the KV cache cannot be what was asked for; see `check_kv`.
        DoesNotFitError: with the nearest thing that does.
    """
    from offload.format_choice import fastest_format
    from offload.kv_check import check_kv
    from placement.planner import PlanInfeasibleError
    from placement.rig import cheapest_doubling, try_change

    def planned(spec: ModelSpec) -> Plan:
        try:
            return rig.plan(spec, workload, routing)
        except PlanInfeasibleError as error:
            raise DoesNotFitError(
                f"{error}. {nearest(spec, rig, workload)}", minimum_ram_bytes=error.minimum_ram_nbytes
            ) from error

    if specs[0].head is None or not specs[0].layers:
        raise UnsupportedModelError(
            f"{specs[0].name} ({specs[0].model_type}): expected a decoder whose layers can be told from other modules, "
            "found none, so that nothing can be predicted for another machine. Fix: plan it for this one, without the "
            "options that name parts"
        )
    if rig.kv is not None:
        above = rig.kv.vram_nbytes if rig.profile.gpu is not None and rig.vram_nbytes else 0
        check_kv(specs[0], replace(rig.kv, vram_nbytes=above), workload.batch)
    best, plan = fastest_format(specs, planned)
    spec = specs[best]
    changes = [try_change(text, changed(rig, text), spec, workload, routing) for text in ahead.what_if]
    if plan.vram is not None and plan.vram.window_layers:
        # What streams is read by the link, which is slower than the CPU's own memory: a few new tokens may not pay.
        changes.insert(0, try_change("the CPU computed alone", rig.with_memory(vram=0), spec, workload, routing))
    simulation = None if simulate is None else simulate.run(spec, rig.profile, plan)
    doubling = None if as_json and ahead.html is None else cheapest_doubling(rig, plan, spec, routing)
    if as_json:
        write_plan_json(plan, simulation)
    else:
        assert doubling is not None
        write_report(spec, plan, rig, changes, doubling, routing)
        if simulation is not None:
            write_simulation(simulation, plan)
    if ahead.html is not None:
        from offload.report_html import write_html

        assert doubling is not None
        write_html(ahead.html, spec, plan, rig, routing, changes, doubling)


def nearest(spec: ModelSpec, rig: Rig, workload: Workload) -> str:
    """What would fit: the longest context with these budgets."""
    from placement.planner import PlanInfeasibleError

    tokens = workload.context_tokens // 2
    while tokens >= 64:
        try:
            rig.plan(spec, replace(workload, context_tokens=tokens))
        except PlanInfeasibleError:
            tokens //= 2
            continue
        return f"With --context {tokens} it fits"
    return "No shorter context fits: give more RAM, or a smaller format with --quant"


def write_report(
    spec: ModelSpec,
    plan: Plan,
    rig: Rig,
    changes: list[Change],
    doubling: tuple[Change | None, Change],
    routing: Routing | None,
) -> None:
    """The report on stdout."""
    from placement.rig import in_words, loaded_in_words

    prediction = plan.prediction
    assert prediction is not None
    routed = plan.expert_count > 0
    tiers = table("tier", "dense", "KV cache", "activations", *(["expert slots"] if routed else []), "all", "budget")
    uses: list[tuple[str, RamUse | VramUse, int, int]] = [("ram", plan.ram, plan.ram_slots, plan.ram_budget_nbytes)]
    if plan.vram is not None:
        uses.insert(0, ("vram", plan.vram.use, plan.vram.slots, plan.vram.budget_nbytes))
    for name, use, slots, budget in uses:
        sizes = [format_size(getattr(use, f"{part}_nbytes")) for part in ("dense", "kv", "activation")]
        held = [f"{slots} of {plan.expert_count}: {format_size(use.slot_nbytes)}"] if routed else []
        add_row(tiers, name, *sizes, *held, format_size(use.total_nbytes), format_size(budget))
    terms = table("", "tokens/s", "range", "binds", *prediction.decode.terms.as_dict(), "hits vram", "hits ram")
    for name, one in (("decode", prediction.decode), ("prefill", prediction.prefill)):
        add_row(terms, name, *_cells(one))
    said = {
        "machine": f"{prediction.profile} ({prediction.basis}: a prediction, nothing was run)",
        "routing": prediction.routing,
        **{f"in {option.in_words}": option.speed_in_words for option in plan.format_options},
        "KV cache": kv_in_words(plan),
        **({"on disk": f"{format_size(plan.disk_nbytes)} for all {plan.expert_count} experts"} if routed else {}),
        **({} if routed else {"dense weights": dense_in_words(plan, len(spec.layers))}),
        "twice as fast": in_words(doubling),
        **{f"what if {change.name}": f"{change.decode_tokens_per_s:.2f} tokens/s" for change in changes},
    }
    if plan.vram is not None and routed:
        said["as loaded"] = f"`offload.load` places by sizes: {loaded_in_words(rig, spec, plan.workload, routing)}"
    write(f"{plan.model}: {formats_in_words(plan)}\n", tiers, "", terms, "", facts(said))


def _cells(one: PassPrediction) -> list[str]:
    slow, fast = one.tokens_per_s_range
    share = [f"{seconds / one.seconds:.0%}" for seconds in one.terms.as_dict().values()]
    hits = [f"{one.vram_hit_rate:.0%}", f"{one.ram_hit_rate:.0%}"]
    return [f"{one.tokens_per_s:.2f}", f"{slow:.2f}-{fast:.2f}", one.binds, *share, *hits]
