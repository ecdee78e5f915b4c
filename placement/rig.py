"""A machine with budgets, and how it would be with another part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from placement.datasheets import CPUS, DRIVES, GPUS, LINKS, datasheet
from placement.hardware_profile import HardwareProfile
from placement.kv import KvChoice
from placement.loaded_planner import make_loaded_plan
from placement.model_spec import ModelSpec
from placement.plan import Plan
from placement.planner import PlanInfeasibleError
from placement.predict import Routing
from placement.tier_planner import make_tiered_plan
from placement.workload import Workload

_GIB = 1 << 30
PARTS = ("ram", "vram", "nvme", "gpu", "link", "cpu")


@dataclass(frozen=True)
class Rig:
    """What plans are made for.

    Attributes:
        profile: the machine.
        ram_nbytes: budget of host memory.
        vram_nbytes: budget of the accelerator's memory; 0 without one.
        kv: what the user wants of the KV cache; see `make_tiered_plan`.
    """

    profile: HardwareProfile
    ram_nbytes: int
    vram_nbytes: int
    kv: KvChoice | None = None

    def plan(self, spec: ModelSpec, workload: Workload, routing: Routing | None = None) -> Plan:
        """The plan; see `make_tiered_plan`."""
        return make_tiered_plan(spec, self.profile, workload, self.ram_nbytes, self.vram_nbytes, routing, self.kv)

    def loaded(self, spec: ModelSpec, workload: Workload, routing: Routing | None = None) -> Plan:
        """What `offload.load` makes of these budgets on a GPU; see `make_loaded_plan`."""
        kv = KvChoice(vram_nbytes=None) if self.kv is None else self.kv
        return make_loaded_plan(spec, self.profile, workload, self.ram_nbytes, self.vram_nbytes, routing, kv)

    def with_memory(self, *, ram: int | None = None, vram: int | None = None) -> Rig:
        """The rig with other budgets."""
        return replace(
            self,
            ram_nbytes=self.ram_nbytes if ram is None else ram,
            vram_nbytes=self.vram_nbytes if vram is None else vram,
        )

    def with_part(self, part: str, name: str) -> Rig:
        """The rig with another drive, accelerator, link or processor, by the names of `placement.datasheets`.

        Raises:
            ValueError: an unknown part or name, or a link without an accelerator.
        """
        profile = self.profile
        if part == "nvme":
            return replace(self, profile=_mixed(profile, disk=datasheet(drive=name).disk))
        if part == "cpu":
            cpu = datasheet(cpu=name).cpu
            return replace(self, profile=_mixed(profile, cpu=replace(cpu, memory_nbytes=profile.cpu.memory_nbytes)))
        if part == "gpu":
            sheet = datasheet(gpu=name)
            made = _mixed(profile, gpu=sheet.gpu, to_gpu=sheet.to_gpu, from_gpu=sheet.from_gpu)
            return Rig(made, self.ram_nbytes, sheet.gpu.memory_nbytes if sheet.gpu else 0, self.kv)
        if part == "link":
            if profile.gpu is None:
                raise ValueError("link= needs a GPU")
            sheet = datasheet(gpu=next(iter(GPUS)), link=name)
            return replace(self, profile=_mixed(profile, to_gpu=sheet.to_gpu, from_gpu=sheet.from_gpu))
        raise ValueError(f"unknown part {part!r}; known: {', '.join(PARTS)}")


def _mixed(profile: HardwareProfile, **changed: object) -> HardwareProfile:
    """A profile with parts from datasheets, which it says."""
    provenance = replace(profile.provenance, kind="datasheet")
    return replace(profile, provenance=provenance, **changed)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Change:
    """Another rig, in words, and what it would be like.

    Attributes:
        name: what is changed.
        plan: made for it; None where the model still does not fit.
    """

    name: str
    plan: Plan | None

    @property
    def decode_tokens_per_s(self) -> float:
        """Expected; 0 where it does not fit."""
        return 0.0 if self.plan is None or self.plan.prediction is None else self.plan.prediction.decode.tokens_per_s


def try_change(name: str, rig: Rig, spec: ModelSpec, workload: Workload, routing: Routing | None) -> Change:
    """The change with its plan."""
    try:
        return Change(name, rig.plan(spec, workload, routing))
    except PlanInfeasibleError:
        return Change(name, None)


def cheapest_doubling(
    rig: Rig, plan: Plan, spec: ModelSpec, routing: Routing | None = None
) -> tuple[Change | None, Change]:
    """(the first change, by price, that doubles the speed of decode, or None; the fastest of all that were tried).

    Prices are not known here: changes are ordered as parts usually cost, memory and drives before accelerators.
    """
    now = plan.prediction.decode.tokens_per_s if plan.prediction else 0.0
    best: Change | None = None
    for name, other in _changes(rig):
        change = try_change(name, other, spec, plan.workload, routing)
        if change.decode_tokens_per_s >= 2 * now:
            return change, change
        if best is None or change.decode_tokens_per_s > best.decode_tokens_per_s:
            best = change
    if best is None:
        raise ValueError("no change to try")
    return None, best


def in_words(found: tuple[Change | None, Change]) -> str:
    """What `cheapest_doubling` found."""
    doubling, best = found
    if doubling is not None:
        return f"{doubling.name}: {doubling.decode_tokens_per_s:.2f} tokens/s"
    return f"no single change that was tried; the best is {best.name}: {best.decode_tokens_per_s:.2f} tokens/s"


def loaded_in_words(rig: Rig, spec: ModelSpec, workload: Workload, routing: Routing | None) -> str:
    """What `offload.load` would put into VRAM, and how fast that is expected to be."""
    try:
        plan = rig.loaded(spec, workload, routing)
    except PlanInfeasibleError as error:
        return f"does not fit: {error}"
    assert plan.vram is not None
    streamed = len(spec.layers) - len(plan.vram.dense_layers)
    dense = f"{streamed} dense layers streaming through it" if streamed else "all dense layers"
    found = f"{dense}, {plan.vram.slots} of {plan.expert_count} experts in VRAM; "
    assert plan.prediction is not None
    decode, prefill = plan.prediction.decode, plan.prediction.prefill
    return found + f"decode {decode.tokens_per_s:.2f}, prefill {prefill.tokens_per_s:.2f} tokens/s"


def _changes(rig: Rig) -> Iterator[tuple[str, Rig]]:
    speed = 0.0 if rig.profile.disk is None else rig.profile.disk.bytes_per_s(4 << 20, 4)
    for more in (16, 32, 64):
        yield f"{more} GiB more RAM", rig.with_memory(ram=rig.ram_nbytes + more * _GIB)
    for drive in ("gen4", "gen5"):
        if DRIVES[drive] > 1.3 * speed:
            yield f"a {drive} drive", rig.with_part("nvme", drive)
    for more in (64, 128):
        if DRIVES["gen5"] > 1.3 * speed:
            both = rig.with_memory(ram=rig.ram_nbytes + more * _GIB).with_part("nvme", "gen5")
            yield f"{more} GiB more RAM and a gen5 drive", both
    for gpu in ("rtx3060", "rtx4060ti", "rtx3090", "rtx4090", "rtx5090"):
        if GPUS[gpu].memory_nbytes > rig.vram_nbytes:
            yield f"an {gpu}", rig.with_part("gpu", gpu)
    for cpu in ("ddr5-desktop", "ddr5-server"):
        if CPUS[cpu].bytes_per_s > 1.5 * rig.profile.cpu.memory_bytes_per_s:
            yield f"a {cpu} processor", rig.with_part("cpu", cpu)
    if rig.profile.to_gpu is not None and LINKS["pcie5"] > 1.3 * rig.profile.to_gpu.bytes_per_s:
        yield "a PCIe 5 link", rig.with_part("link", "pcie5")


def sweep(
    rig: Rig, plan: Plan, spec: ModelSpec, routing: Routing | None = None, points: int = 6
) -> dict[str, list[tuple[int, float]]]:
    """Decode tokens/s by "ram", "vram" and "context": from little to what holds everything; 0 where it does not fit."""
    work = plan.workload
    everything = spec.dense_nbytes + spec.expert_nbytes + plan.ram.kv_nbytes + plan.ram.activation_nbytes
    ram = [round(everything * (index + 1) / points) for index in range(points)]
    vram = [round(everything * index / points) for index in range(points + 1)] if rig.profile.gpu else []
    contexts = sorted({min(spec.max_context_tokens, 1 << power) for power in range(9, 18, 2)})

    def speed(other: Rig, workload: Workload) -> float:
        return try_change("", other, spec, workload, routing).decode_tokens_per_s

    return {
        "ram": [(nbytes, speed(rig.with_memory(ram=nbytes), work)) for nbytes in ram],
        "vram": [(nbytes, speed(rig.with_memory(vram=nbytes), work)) for nbytes in vram],
        "context": [
            (tokens, speed(rig, replace(work, context_tokens=tokens, prompt_tokens=max(1, tokens - work.new_tokens))))
            for tokens in contexts
        ],
    }
