"""What a plan is expected to do: seconds by term, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True)
class Terms:
    """Seconds of a pass along its critical path; the sum is the pass.

    Where devices work at the same time the longer one counts, and a wait counts for what is waited for.

    Attributes:
        dense_s: linear layers outside routed experts, the output layer too.
        attention_s: attention to cached and new tokens.
        cpu_experts_s: routed experts on the CPU.
        gpu_experts_s: routed experts on the accelerator.
        link_s: waiting for copies to or from the accelerator.
        disk_s: waiting for reads.
        overhead_s: calls, norms, rotary angles, routing, masks, choosing a token.
    """

    dense_s: float = 0.0
    attention_s: float = 0.0
    cpu_experts_s: float = 0.0
    gpu_experts_s: float = 0.0
    link_s: float = 0.0
    disk_s: float = 0.0
    overhead_s: float = 0.0

    @property
    def total_s(self) -> float:
        """The pass."""
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, float]:
        """Seconds by term, the names without their unit."""
        return {field.name.removesuffix("_s"): getattr(self, field.name) for field in fields(self)}

    def plus(self, other: Terms, times: float = 1.0) -> Terms:
        """The sum with `times` times another."""
        return Terms(*(getattr(self, field.name) + times * getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class PassPrediction:
    """Forward passes: one of decode, or all of a prompt.

    Attributes:
        tokens: that come out of it or go into it, all sequences together.
        terms: seconds.
        low_s: least seconds of the range.
        high_s: most seconds of the range.
        cpu_busy_s: seconds in which the CPU's kernels work.
        gpu_busy_s: seconds in which the accelerator's kernels work.
        link_busy_s: seconds in which bytes cross to or from the accelerator.
        disk_busy_s: seconds in which the disk reads.
        vram_hit_rate: share of needed experts found in VRAM.
        ram_hit_rate: share found in RAM.
        read_nbytes: bytes read from disk.
        copied_nbytes: bytes of experts copied to the accelerator.
    """

    tokens: int
    terms: Terms
    low_s: float
    high_s: float
    cpu_busy_s: float
    gpu_busy_s: float
    link_busy_s: float
    disk_busy_s: float
    vram_hit_rate: float
    ram_hit_rate: float
    read_nbytes: float
    copied_nbytes: float

    @property
    def seconds(self) -> float:
        """Expected."""
        return self.terms.total_s

    @property
    def tokens_per_s(self) -> float:
        """Expected speed."""
        return self.tokens / self.seconds

    @property
    def tokens_per_s_range(self) -> tuple[float, float]:
        """Slowest and fastest."""
        return self.tokens / self.high_s, self.tokens / self.low_s

    @property
    def binds(self) -> str:
        """The term with the most seconds."""
        return max(self.terms.as_dict().items(), key=lambda item: item[1])[0]


@dataclass(frozen=True)
class Prediction:
    """What a plan is expected to do for its workload.

    Attributes:
        decode: one pass of one new token for each sequence, half-way through the new tokens.
        prefill: the whole prompt of every sequence.
        profile: name of the hardware profile.
        basis: where its figures come from.
        routing: what is assumed of the experts' popularity, in words.
        peak_ram_nbytes: most host memory that the workload is expected to take, the interpreter and its libraries not
            counted. The plan's peak, which bounds it, has room for any prompt within the context and for the most that
            allocators keep. None: as the plan's.
    """

    decode: PassPrediction
    prefill: PassPrediction
    profile: str
    basis: Literal["measured", "datasheet"]
    routing: str
    peak_ram_nbytes: int | None = None

    def request_s(self, new_tokens: int) -> float:
        """Seconds of a prompt and its new tokens."""
        return self.prefill.seconds + new_tokens * self.decode.seconds
