"""The plan: the whole contract between planning and running."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from placement.kv import KvPlan
from placement.prediction import Prediction
from placement.records import from_json, to_json
from placement.workload import Workload

PLAN_VERSION = 5

Tier = Literal["vram", "ram", "nvme"]


@dataclass(frozen=True)
class RamUse:
    """Host memory by purpose, in bytes; the sum is what the runtime holds at its peak.

    Attributes:
        dense_nbytes: all weights and buffers that are not routed experts.
        kv_nbytes: cache of `workload.batch` sequences of `workload.context_tokens` tokens, or what of it is in RAM.
        activation_nbytes: activations of the largest forward pass, logits, tables of the cache policy, and what a
            weight needs while it loads.
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
class VramUse:
    """An accelerator's memory by purpose, in bytes.

    Attributes:
        dense_nbytes: dense weights of layers, and the output layer.
        kv_nbytes: KV cache of layers.
        activation_nbytes: activations of the largest forward pass, and two slots through which experts are copied.
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
class VramPlan:
    """What lives in an accelerator's memory.

    Attributes:
        dense_layers: decoder layers whose dense weights are there, ascending.
        kv_layers: those of them whose KV cache is there.
        head: whether the output layer is.
        slots: expert slots.
        use: memory by purpose.
        budget_nbytes: what the user allowed.
        window_layers: decoder layers of which there is room in a window through which the dense weights of all that are
            not in `dense_layers` stream in every pass; 0 where those compute on the CPU.
    """

    dense_layers: tuple[int, ...]
    kv_layers: tuple[int, ...]
    head: bool
    slots: int
    use: VramUse
    budget_nbytes: int
    window_layers: int = 0

    def __post_init__(self) -> None:
        if self.use.total_nbytes > self.budget_nbytes:
            raise ValueError(f"{self.use.total_nbytes} bytes of VRAM planned, above the budget of {self.budget_nbytes}")
        if self.slots < 0 or not set(self.kv_layers) <= set(self.dense_layers):
            raise ValueError("a plan for VRAM with a negative number of slots, or KV cache without its layer")


@dataclass(frozen=True)
class FormatOption:
    """Formats that the planner weighed because the user left them open.

    Attributes:
        experts: of the experts.
        dense: of the decoder's other linear layers.
        head: of the output layer.
        decode_tokens_per_s: expected, None where the model does not fit in these formats.
        prefill_tokens_per_s: expected, None where it does not fit.
    """

    experts: str
    dense: str
    head: str
    decode_tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None

    @property
    def in_words(self) -> str:
        """The formats; one where all are the same."""
        if self.experts == self.dense == self.head:
            return self.experts
        if self.experts == self.dense:
            return f"{self.experts} with the output layer in {self.head}"
        return f"experts in {self.experts}, others in {self.dense}, output layer in {self.head}"

    @property
    def speed_in_words(self) -> str:
        """What is expected."""
        if self.decode_tokens_per_s is None or self.prefill_tokens_per_s is None:
            return "does not fit"
        return f"decode {self.decode_tokens_per_s:.2f} tokens/s, prefill {self.prefill_tokens_per_s:.2f} tokens/s"


@dataclass(frozen=True)
class Plan:
    """Where everything lies. The runtime executes this and nothing else; the record is plain JSON.

    Invariants: `ram.total_nbytes <= ram_budget_nbytes`; `ram.slot_nbytes == ram_slots * slot_nbytes`;
    `1 <= ram_slots <= expert_count`, or both are 0.

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
        expert_count: experts of all layers; 0 of a dense model, which has no store.
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
        vram: what lives in an accelerator's memory, None for a plan without.
        prediction: expected speed by term, None where no hardware profile was given.
        kv: a KV cache in blocks; None for one that grows in place, in the model's dtype and in RAM.
        format_options: formats that were weighed, the most precise first; none where the user named them.
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
    vram: VramPlan | None = None
    prediction: Prediction | None = None
    kv: KvPlan | None = None
    format_options: tuple[FormatOption, ...] = ()

    def __post_init__(self) -> None:
        if not min(1, self.expert_count) <= self.ram_slots <= self.expert_count:
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
    def workload_peak_ram_nbytes(self) -> int:
        """What the plan's own workload is expected to take of it; all, where nothing was predicted."""
        expected = None if self.prediction is None else self.prediction.peak_ram_nbytes
        return self.peak_ram_nbytes if expected is None else expected

    @property
    def resident_fraction(self) -> float:
        """Share of the experts that slots can hold at once, 0 to 1; 1 where there are none."""
        return self.ram_slots / self.expert_count if self.expert_count else 1.0

    def to_json(self) -> str:
        """The plan as JSON, with its version."""
        return to_json(self, PLAN_VERSION)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: not JSON, another version, fields that are missing, unknown or of another type, or figures
                that contradict each other.
        """
        return from_json(cls, text, PLAN_VERSION, "plan")
