"""What a machine has and how fast it is, measured or from datasheets."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any, Literal

from formats.packed import PACKED_FORMATS
from placement.curves import SmallProducts, TokenCurve
from placement.disk import Disk
from placement.records import from_json, to_json

PROFILE_VERSION = 17

SMALL_PROMPT_TOKENS = 64
"""Of prompts of a small model."""


@dataclass(frozen=True)
class Speeds:
    """How fast the host's parts are at a moment, each over what a profile says.

    Attributes:
        memory: of what waits for memory, as products of few tokens do.
        arithmetic: of what waits for the processor, as products of many tokens do.
        disk: of reads that go on.
        bursts: of a layer's reads, before which there are none; None: as `disk`.
        between: of products of `curves.BETWEEN_TOKENS` tokens; None: by how long these wait for memory.
        linear_memory: of linear layers, which are smaller than a layer's experts; None: as `memory`.
        linear_between: likewise as `between`.
        linear_arithmetic: likewise as `arithmetic`.
        small_experts: of experts with few weights, beside what the three of experts make of the curve.
        small_linears: of linear layers with few weights, likewise.
        attention: of prompts' attention; None: as `arithmetic`.
        steps: of what lies beside products and attention in passes of one token; None: as `arithmetic`.
        prompts: likewise in passes of more tokens.
    """

    memory: float = 1.0
    arithmetic: float = 1.0
    disk: float = 1.0
    bursts: float | None = None
    between: float | None = None
    linear_memory: float | None = None
    linear_between: float | None = None
    linear_arithmetic: float | None = None
    small_experts: SmallProducts | None = None
    small_linears: SmallProducts | None = None
    attention: float | None = None
    steps: float | None = None
    prompts: float | None = None

    @property
    def of_experts(self) -> tuple[float, float, float | None, SmallProducts | None]:
        """Of few tokens, of many, of some between, and of those with few weights."""
        return self.memory, self.arithmetic, self.between, self.small_experts

    @property
    def of_linears(self) -> tuple[float, float, float | None, SmallProducts | None]:
        """Likewise of linear layers."""
        return (
            self.memory if self.linear_memory is None else self.linear_memory,
            self.arithmetic if self.linear_arithmetic is None else self.linear_arithmetic,
            self.between if self.linear_between is None else self.linear_between,
            self.small_linears,
        )

    @property
    def of_attention(self) -> float:
        """Of prompts' attention."""
        return self.arithmetic if self.attention is None else self.attention

    @property
    def of_steps(self) -> float:
        """Of what lies beside products and attention in passes of one token."""
        return self.arithmetic if self.steps is None else self.steps

    @property
    def of_prompts(self) -> float:
        """Likewise in passes of more tokens."""
        return self.arithmetic if self.prompts is None else self.prompts

    @classmethod
    def median_of(cls, found: Sequence[Speeds]) -> Speeds:
        """The median of each; None where nobody found it."""
        medians: dict[str, Any] = {}
        for part in fields(cls):
            values = [value for one in found if (value := getattr(one, part.name)) is not None]
            if values and isinstance(values[0], SmallProducts):
                parts = zip(*map(astuple, values), strict=True)
                medians[part.name] = SmallProducts(*map(statistics.median, parts))
            elif values:
                medians[part.name] = statistics.median(values)
        return cls(**medians)


@dataclass(frozen=True)
class Link:
    """A way for bytes.

    Attributes:
        latency_s: of one copy, whatever its size.
        bytes_per_s: of large copies while nothing else runs.
        overlapped_bytes_per_s: while the CPU's kernels read memory at full speed.
    """

    latency_s: float
    bytes_per_s: float
    overlapped_bytes_per_s: float

    def seconds(self, nbytes: float, copies: float = 1.0) -> float:
        """Seconds of copies of `nbytes` together, beside working CPU kernels."""
        return copies * self.latency_s + nbytes / self.overlapped_bytes_per_s


@dataclass(frozen=True)
class FormatCurve:
    """The curve of one format."""

    format: str
    curve: TokenCurve


@dataclass(frozen=True)
class AttentionSpeed:
    """Attention of new tokens to cached ones; flops are two for each product and sum.

    A score takes its exponential and sums besides its products, whatever the width of heads, so narrow heads take more
    for each product than wide ones.

    Attributes:
        call_s: of a layer, whatever its size.
        bytes_per_s: at which the cache is read.
        few_flops_per_s: for one new token of each sequence.
        flops_per_s: for many new tokens.
        prompt_call_s: in the place of `call_s` for many new tokens, whose keys and values are laid out first.
        few_score_s: of each score, beside its products, for one new token of each sequence.
        score_s: likewise for many new tokens.
    """

    call_s: float
    bytes_per_s: float
    few_flops_per_s: float
    flops_per_s: float
    prompt_call_s: float | None = None
    few_score_s: float = 0.0
    score_s: float = 0.0

    def seconds(self, kv_nbytes: float, flops: float, new_tokens: int, scores: float = 0.0) -> float:
        """Seconds of one layer: reading or computing, whichever takes longer."""
        if new_tokens == 1:
            call_s, computing_s = self.call_s, flops / self.few_flops_per_s + scores * self.few_score_s
        else:
            call_s = self.call_s if self.prompt_call_s is None else self.prompt_call_s
            computing_s = flops / self.flops_per_s + scores * self.score_s
        return call_s + max(kv_nbytes / self.bytes_per_s, computing_s)

    def with_speeds(self, memory: float, arithmetic: float, prompts: float) -> AttentionSpeed:
        """Reading the cache follows memory, what else many new tokens take `prompts`, and all else arithmetic."""
        prompt = None if self.prompt_call_s is None else self.prompt_call_s / prompts
        return AttentionSpeed(
            self.call_s / arithmetic,
            self.bytes_per_s * memory,
            self.few_flops_per_s * arithmetic,
            self.flops_per_s * prompts,
            prompt,
            self.few_score_s / arithmetic,
            self.score_s / prompts,
        )


@dataclass(frozen=True)
class BlockSpeed:
    """Attention of one new token of each sequence to a KV cache in blocks of one format.

    Attributes:
        format: of the blocks.
        call_s: of a layer, whatever its size.
        bytes_per_s: at which blocks are read.
        flops_per_s: two for each product and sum, what unpacks blocks included.
        score_s: of each score, beside its products.
    """

    format: str
    call_s: float
    bytes_per_s: float
    flops_per_s: float
    score_s: float = 0.0

    def seconds(self, kv_nbytes: float, flops: float, scores: float = 0.0) -> float:
        """Seconds of one layer: reading or computing, whichever takes longer."""
        return self.call_s + max(kv_nbytes / self.bytes_per_s, flops / self.flops_per_s + scores * self.score_s)

    def with_speeds(self, memory: float, arithmetic: float) -> BlockSpeed:
        """Reading blocks follows memory, all else arithmetic."""
        return BlockSpeed(
            self.format, self.call_s / arithmetic, self.bytes_per_s * memory, self.flops_per_s * arithmetic,
            self.score_s / arithmetic,
        )  # fmt: skip


@dataclass(frozen=True)
class Overheads:
    """What a forward pass costs beside products, attention and reads.

    Attributes:
        pass_s: once a pass: masks, angles, hooks, choosing a token.
        layer_s: in each layer of a pass of one token of each sequence: calls, norms, rotary angles, routing. Below zero
            where layers in a row take less than their products one by one.
        element_s: for each new token and entry of the residual stream in each layer.
        step_s: more in each MoE layer of such a pass as long as not every expert has a slot: looking for experts.
        prompt_layer_s: in each layer of a pass of more tokens, in the place of `layer_s` and `step_s`.
        step_arrival_s: in a pass of one token of each sequence, for each expert that comes from disk, beside its read
            and its product, in the place of the kernels' call: asking for it, a slot for it, hearing that it is there,
            waking threads. None: what a call takes.
        arrival_s: in a pass of more tokens, likewise, beside the kernels' call.
        grouped_output_s: for each number that experts put out in a step that sums them group by group, more than where
            all are kept and summed at once.
    """

    pass_s: float
    layer_s: float
    element_s: float
    step_s: float = 0.0
    prompt_layer_s: float | None = None
    step_arrival_s: float | None = None
    arrival_s: float = 0.0
    grouped_output_s: float = 0.0

    def of_layer(self, new_tokens: int) -> float:
        """Seconds in each layer, whatever its size and whatever its experts do."""
        return self.layer_s if new_tokens == 1 or self.prompt_layer_s is None else self.prompt_layer_s

    def with_speeds(self, steps: float, prompts: float, arithmetic: float) -> Overheads:
        """Where what passes of one token take goes `steps` times as fast, what others take `prompts` times, and sums of
        outputs `arithmetic` times.
        """
        prompt = None if self.prompt_layer_s is None else self.prompt_layer_s / prompts
        arrival = None if self.step_arrival_s is None else self.step_arrival_s / steps
        return Overheads(
            self.pass_s / steps, self.layer_s / steps, self.element_s / prompts, self.step_s / steps, prompt, arrival,
            self.arrival_s / prompts, self.grouped_output_s / arithmetic,
        )  # fmt: skip


@dataclass(frozen=True)
class Compute:
    """A device that computes.

    Attributes:
        memory_nbytes: what it may use.
        memory_bytes_per_s: at which it streams its memory.
        experts: seconds of expert MLPs, by format.
        linears: seconds of linear layers, by format.
        attention: of one layer.
        overheads: of a pass whose dense layers run here.
        packed_overheads: likewise where these layers are packed; None: the same.
        blocks: attention to KV caches in blocks; formats that are not there: as `attention`.
        small_step_s: of a pass of one token through a model so small that its products are little of it; None: not
            measured.
        small_prompt_s: likewise of a prompt of SMALL_PROMPT_TOKENS tokens.
    """

    memory_nbytes: int
    memory_bytes_per_s: float
    experts: tuple[FormatCurve, ...]
    linears: tuple[FormatCurve, ...]
    attention: AttentionSpeed
    overheads: Overheads
    packed_overheads: Overheads | None = None
    blocks: tuple[BlockSpeed, ...] = ()
    small_step_s: float | None = None
    small_prompt_s: float | None = None

    def decode_attention_s(self, kv_nbytes: float, flops: float, format: str | None, scores: float = 0.0) -> float:
        """Seconds of one layer's attention of one new token of each sequence.

        Args:
            kv_nbytes: that are read.
            flops: two for each product and sum.
            format: of the cache's blocks; None for one that lies in one piece.
            scores: of queries with cached tokens.
        """
        for known in self.blocks:
            if known.format == format:
                return known.seconds(kv_nbytes, flops, scores)
        return self.attention.seconds(kv_nbytes, flops, 1, scores)

    def overheads_in(self, format: str | None) -> Overheads:
        """The overheads of dense layers in a format; None for a layer that has none."""
        if self.packed_overheads is not None and format in PACKED_FORMATS:
            return self.packed_overheads
        return self.overheads

    def expert(self, format: str) -> TokenCurve:
        """The curve of expert MLPs in a format.

        Raises:
            ValueError: the profile has none.
        """
        return _curve(self.experts, format, "experts")

    def linear(self, format: str) -> TokenCurve:
        """The curve of linear layers in a format.

        Raises:
            ValueError: the profile has none.
        """
        return _curve(self.linears, format, "linear layers")

    def with_speeds(self, speeds: Speeds) -> Compute:
        """The device at other speeds of its parts."""
        memory, arithmetic = speeds.memory, speeds.arithmetic
        beside = (speeds.of_steps, speeds.of_prompts, arithmetic)
        packed = self.packed_overheads
        return replace(
            self,
            memory_bytes_per_s=memory * self.memory_bytes_per_s,
            experts=tuple(FormatCurve(one.format, one.curve.with_speeds(*speeds.of_experts)) for one in self.experts),
            linears=tuple(FormatCurve(one.format, one.curve.with_speeds(*speeds.of_linears)) for one in self.linears),
            attention=self.attention.with_speeds(memory, arithmetic, speeds.of_attention),
            overheads=self.overheads.with_speeds(*beside),
            packed_overheads=None if packed is None else packed.with_speeds(*beside),
            blocks=tuple(one.with_speeds(memory, arithmetic) for one in self.blocks),
        )


def _curve(curves: tuple[FormatCurve, ...], format: str, what: str) -> TokenCurve:
    for known in curves:
        if known.format == format:
            return known.curve
    raise ValueError(
        f"the hardware profile has no curve of {what} in {format!r}, only {', '.join(c.format for c in curves)}; "
        "profile the machine again"
    )


@dataclass(frozen=True)
class Provenance:
    """Where a profile's figures come from.

    Attributes:
        kind: "measured" here, or from "datasheet"s and typical figures.
        machine: processor, memory and accelerator, in words.
        fingerprint: of what was measured; another one means that the profile is stale.
        date: ISO 8601, UTC.
        versions: of the libraries, as "name version".
        notes: what a reader must know, such as figures that did not become stable.
    """

    kind: Literal["measured", "datasheet"]
    machine: str
    fingerprint: str
    date: str
    versions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class HardwareProfile:
    """A machine. With an accelerator, `gpu`, `to_gpu` and `from_gpu` are all there.

    Attributes:
        name: in words.
        cpu: the processor with host memory.
        gpu: the accelerator with its memory.
        to_gpu: copies of experts and activations from host memory, which is pinned.
        from_gpu: copies of activations back, into pageable memory.
        pinned_nbytes: host memory that may be locked for copies.
        disk: of the expert store; None where nothing was measured.
        provenance: where all this comes from.
    """

    name: str
    cpu: Compute
    gpu: Compute | None
    to_gpu: Link | None
    from_gpu: Link | None
    pinned_nbytes: int
    disk: Disk | None
    provenance: Provenance = field(repr=False)

    def __post_init__(self) -> None:
        if len({self.gpu is None, self.to_gpu is None, self.from_gpu is None}) != 1:
            raise ValueError("a profile has an accelerator and both links to it, or none of them")

    def knows(self, formats: Iterable[str]) -> bool:
        """Whether there are curves of all these formats, of experts and of linear layers."""
        both = {one.format for one in self.cpu.experts} & {one.format for one in self.cpu.linears}
        return both.issuperset(formats)

    def with_speeds(self, speeds: Speeds) -> HardwareProfile:
        """The profile at other speeds of the host's parts, as a probe just found them."""
        disk = None if self.disk is None else self.disk.times(speeds.disk, speeds.bursts)
        return replace(self, cpu=self.cpu.with_speeds(speeds), disk=disk)

    def without_gpu(self) -> HardwareProfile:
        """The machine without its accelerator."""
        return replace(self, gpu=None, to_gpu=None, from_gpu=None)

    def to_json(self) -> str:
        """The profile as JSON, with its version."""
        return to_json(self, PROFILE_VERSION)

    @classmethod
    def from_json(cls, text: str) -> HardwareProfile:
        """The profile that `to_json` wrote.

        Raises:
            ValueError: see `placement.records.from_json`.
        """
        return from_json(cls, text, PROFILE_VERSION, "hardware profile")
