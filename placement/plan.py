"""The plan: the whole contract between planning and running."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from placement.workload import Workload

PLAN_VERSION = 1

Tier = Literal["vram", "ram", "nvme"]


@dataclass(frozen=True)
class RamUse:
    """Host memory by purpose, in bytes; the sum is what the runtime holds at its peak.

    Attributes:
        dense_nbytes: all weights and buffers that are not routed experts.
        kv_nbytes: cache of `workload.batch` sequences of `workload.context_tokens` tokens.
        activation_nbytes: activations of the largest forward pass, logits, and what a weight needs while it loads.
        slot_nbytes: expert slots.
    """

    dense_nbytes: int
    kv_nbytes: int
    activation_nbytes: int
    slot_nbytes: int

    @property
    def total_nbytes(self) -> int:
        """All of it."""
        return self.dense_nbytes + self.kv_nbytes + self.activation_nbytes + self.slot_nbytes


@dataclass(frozen=True)
class Plan:
    """Where everything lies. The runtime executes this and nothing else; the record is plain JSON.

    Invariants: `ram.total_nbytes <= ram_budget_nbytes`; `ram.slot_nbytes == ram_slots * slot_nbytes`;
    `1 <= ram_slots <= expert_count`.

    Attributes:
        model: what the user called the model.
        model_type: transformers' name of the architecture.
        format: format of the experts, in the store and in every tier.
        dense_format: format of the decoder's other linear layers.
        head_format: format of the output layer.
        workload: what the plan was made for.
        dense_tier: where dense weights live.
        kv_tier: where the KV cache lives.
        expert_home: where every expert can always be found.
        expert_count: experts of all layers.
        expert_nbytes: bytes of all of them.
        experts_per_token: experts that one token is routed to, all layers together.
        slot_nbytes: bytes of one expert slot.
        ram_slots: expert slots in host memory.
        ram: host memory by purpose.
        ram_budget_nbytes: what the user allowed.
        minimum_ram_nbytes: the least budget with which this request fits.
        disk_nbytes: bytes that the store needs on disk.
        kv_nbytes_per_token: growth of one sequence's cache.
        read_chunk_nbytes: expert reads are cut into pieces of this size, so that an urgent one overtakes.
        reader_threads: reads in flight.
    """

    model: str
    model_type: str
    format: str
    dense_format: str
    head_format: str
    workload: Workload
    dense_tier: Tier
    kv_tier: Tier
    expert_home: Tier
    expert_count: int
    expert_nbytes: int
    experts_per_token: int
    slot_nbytes: int
    ram_slots: int
    ram: RamUse
    ram_budget_nbytes: int
    minimum_ram_nbytes: int
    disk_nbytes: int
    kv_nbytes_per_token: int
    read_chunk_nbytes: int
    reader_threads: int

    def __post_init__(self) -> None:
        if not 1 <= self.ram_slots <= self.expert_count:
            raise ValueError(f"a plan of {self.ram_slots} slots for {self.expert_count} experts")
        if self.ram.slot_nbytes != self.ram_slots * self.slot_nbytes:
            raise ValueError(f"{self.ram_slots} slots of {self.slot_nbytes} bytes are not {self.ram.slot_nbytes} bytes")
        if self.ram.total_nbytes > self.ram_budget_nbytes:
            raise ValueError(f"{self.ram.total_nbytes} bytes planned, above the budget of {self.ram_budget_nbytes}")

    @property
    def peak_ram_nbytes(self) -> int:
        """Most host memory that the runtime holds, the interpreter and its libraries not counted."""
        return self.ram.total_nbytes

    @property
    def resident_fraction(self) -> float:
        """Share of the experts that slots can hold at once, 0 to 1."""
        return self.ram_slots / self.expert_count

    def to_json(self) -> str:
        """The plan as JSON, with its version."""
        return json.dumps({"version": PLAN_VERSION, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: not JSON, another version, fields that are missing, unknown or of another type, or figures
                that contradict each other.
        """
        try:
            data = json.loads(text)
        except RecursionError:
            data = None
        version = data.pop("version", None) if isinstance(data, dict) else None
        if not isinstance(data, dict) or type(version) is not int or version != PLAN_VERSION:
            raise ValueError(f"not a plan of version {PLAN_VERSION}")
        data["workload"] = _record(Workload, data.get("workload"))
        data["ram"] = _record(RamUse, data.get("ram"))
        return _record(cls, data)


_Record = TypeVar("_Record")


def _record(kind: type[_Record], data: Any) -> _Record:
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(data, dict) or set(data) != names:
        found = sorted(data) if isinstance(data, dict) else data
        raise ValueError(f"{kind.__name__} of a plan needs exactly the fields {sorted(names)}, found {found}")
    for name, expected in get_type_hints(kind).items():
        value = data[name]
        choices = get_args(expected)
        if value not in choices if choices else type(value) is not expected:
            raise ValueError(f"{name} of a plan: expected {choices or expected.__name__}, found {value!r}")
    return kind(**data)
