"""From a model, a machine, homes and a workload to seconds by term."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from placement.dense_cost import DenseCost, layer_cost, pass_cost, streamed_s
from placement.expert_cost import ExpertCost, expert_cost, longer_after_reads
from placement.hardware_profile import HardwareProfile
from placement.homes import Homes
from placement.kept_hits import kept_hits
from placement.layer_kinds import LayerKind, layer_kinds
from placement.model_spec import ExpertsSpec, ModelSpec
from placement.passes import Pass, decode_pass, prefill_passes
from placement.prediction import PassPrediction, Prediction, Terms
from placement.routing import FloatArray, HitCurve, LayerDemand, NothingToFind, Popularity, demand
from placement.workload import Workload

UNCERTAINTY = {"measured": 0.30, "datasheet": 0.35}
"""Share by which seconds may be off, by where the profile comes from; the ends of a range."""

EQUAL = Popularity()

_SKEW_STEP = 0.4
"""By which the popularity may differ from the stated one, where no trace tells."""


@dataclass(frozen=True)
class Routing:
    """What is known of which experts are needed.

    Attributes:
        popularity: the stated model; how many experts a pass needs always comes from it.
        decode_hits: hit curve of a recorded sequence for passes of decode, None for what follows from the popularity.
        source: in words.
        decode_rows: tokens of these passes.
    """

    popularity: Popularity = EQUAL
    decode_hits: HitCurve | None = None
    source: str = "no trace: experts of a layer taken as equally popular, tokens as independent"
    decode_rows: int = 1

    @classmethod
    def stated(cls, skew: float, locality: float = 0.0) -> Routing:
        """A popularity that the user states."""
        popularity = Popularity(skew, locality)
        return cls(popularity, None, f"no trace: popularity stated as rank^-{skew:g}, {locality:.0%} repeated")

    def hits(self, spec: ModelSpec, work: Pass) -> HitCurve:
        """The hit curve of passes of this kind."""
        if self.decode_hits is not None and work.new_tokens == 1 and work.rows == self.decode_rows:
            return self.decode_hits
        layers = tuple((layer.count, min(layer.top_k, layer.count)) for layer in spec.experts)
        if not layers:
            return NothingToFind()
        return kept_hits(layers, self.popularity, work.batch, None if work.new_tokens == 1 else work.rows)

    def demand(self, experts: ExpertsSpec, work: Pass) -> LayerDemand:
        """What a pass needs of an MoE layer."""
        return demand(experts.count, experts.top_k, work.rows, self.popularity)


def predict(
    spec: ModelSpec, profile: HardwareProfile, homes: Homes, workload: Workload, routing: Routing | None = None
) -> Prediction:
    """The expected speed, with its range.

    Args:
        spec: with layers.
        profile: the machine; with a disk unless every expert has a slot.
        homes: where everything lives.
        workload: what will run.
        routing: what is known of the experts' popularity; None for nothing.

    Raises:
        ValueError: the spec has no layers, or the profile lacks a format, a disk or an accelerator.
    """
    routing = Routing() if routing is None else routing
    if not homes.uses_vram:
        profile = profile.without_gpu()
    decode = _ranged(spec, profile, homes, [decode_pass(workload)], routing, workload.batch)
    prompt = min(workload.prompt_tokens, workload.context_tokens) * workload.batch
    prefill = _ranged(spec, profile, homes, prefill_passes(workload), routing, prompt)
    source = routing.source if spec.experts else "no experts, nothing is routed"
    return Prediction(decode, prefill, profile.name, profile.provenance.kind, source)


def expected_s(
    spec: ModelSpec, profile: HardwareProfile, homes: Homes, workload: Workload, routing: Routing | None = None
) -> float:
    """Seconds of a prompt and its new tokens, as `predict` expects them."""
    routing = Routing() if routing is None else routing
    if not homes.uses_vram:
        profile = profile.without_gpu()
    prefill = _passes(spec, profile, homes, prefill_passes(workload), routing).terms.total_s
    return prefill + workload.new_tokens * _passes(spec, profile, homes, [decode_pass(workload)], routing).terms.total_s


def _ranged(
    spec: ModelSpec, profile: HardwareProfile, homes: Homes, works: list[Pass], routing: Routing, tokens: int
) -> PassPrediction:
    """Seconds as expected, and with speeds and popularity at either end of what is unknown."""
    found = _passes(spec, profile, homes, works, routing)
    low = high = found.terms.total_s
    if routing.decode_hits is None:
        skew, locality = routing.popularity.skew, routing.popularity.locality
        ends = [Popularity(max(0.0, skew - _SKEW_STEP), locality), Popularity(skew + _SKEW_STEP, locality)]
        seconds = [_passes(spec, profile, homes, works, Routing(end)).terms.total_s for end in ends]
        low, high = min(low, *seconds), max(high, *seconds)
    share = UNCERTAINTY[profile.provenance.kind]
    needed = found.needed or 1.0
    return PassPrediction(
        tokens=tokens,
        terms=found.terms,
        low_s=low / (1 + share),
        high_s=high * (1 + share),
        cpu_busy_s=found.cpu_busy_s,
        gpu_busy_s=found.gpu_busy_s,
        link_busy_s=found.link_busy_s,
        disk_busy_s=found.disk_busy_s,
        vram_hit_rate=found.vram_hits / needed,
        ram_hit_rate=found.ram_hits / needed,
        read_nbytes=found.read_nbytes,
        copied_nbytes=found.copied_nbytes,
    )


@dataclass
class _Sum:
    """What passes add up to."""

    terms: Terms = field(default_factory=Terms)
    cpu_busy_s: float = 0.0
    gpu_busy_s: float = 0.0
    link_busy_s: float = 0.0
    disk_busy_s: float = 0.0
    needed: float = 0.0
    vram_hits: float = 0.0
    ram_hits: float = 0.0
    read_nbytes: float = 0.0
    copied_nbytes: float = 0.0

    def add_dense(self, cost: DenseCost, times: float) -> None:
        terms = Terms(
            dense_s=cost.dense_s, attention_s=cost.attention_s, overhead_s=cost.overhead_s, link_s=cost.link_s
        )
        self.terms = self.terms.plus(terms, times)
        self.gpu_busy_s += times * cost.gpu_busy_s
        self.cpu_busy_s += times * (cost.total_s - cost.gpu_busy_s - cost.link_s)
        self.link_busy_s += times * cost.link_s

    def add_experts(self, cost: ExpertCost, need: float, rates: tuple[float, float], nbytes: int, times: float) -> None:
        first = [float(value[0]) for value in (cost.cpu_s, cost.gpu_s, cost.link_s, cost.disk_s)]
        terms = Terms(cpu_experts_s=first[0], gpu_experts_s=first[1], link_s=first[2], disk_s=first[3])
        self.terms = self.terms.plus(terms, times)
        self.cpu_busy_s += times * float(cost.cpu_busy_s[0])
        self.gpu_busy_s += times * float(cost.gpu_busy_s[0])
        self.link_busy_s += times * float(cost.link_busy_s[0])
        self.disk_busy_s += times * float(cost.disk_busy_s[0])
        self.needed += times * need
        self.vram_hits += times * need * rates[0]
        self.ram_hits += times * need * rates[1]
        self.read_nbytes += times * need * max(0.0, 1 - rates[0] - rates[1]) * nbytes
        self.copied_nbytes += times * float(cost.copied[0]) * nbytes


def hit_rates(curve: HitCurve, vram_slots: FloatArray, ram_slots: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Shares found in VRAM and in RAM, by numbers of slots: RAM keeps what VRAM last gave up, so both are one cache."""
    in_vram = curve.rate(vram_slots)
    return in_vram, np.maximum(curve.rate(vram_slots + ram_slots) - in_vram, 0.0)


def _passes(spec: ModelSpec, profile: HardwareProfile, homes: Homes, works: list[Pass], routing: Routing) -> _Sum:
    total = _Sum()
    for work in works:
        _add_pass(total, spec, profile, homes, work, routing)
    return total


def _add_pass(
    total: _Sum, spec: ModelSpec, profile: HardwareProfile, homes: Homes, work: Pass, routing: Routing
) -> None:
    before_s, link_before_s = total.terms.total_s, total.link_busy_s
    head_s, overhead_s = pass_cost(spec, profile, homes, work)
    total.terms = total.terms.plus(Terms(dense_s=head_s, overhead_s=overhead_s), work.count)
    if homes.head_in_vram:
        total.gpu_busy_s += work.count * head_s
    else:
        total.cpu_busy_s += work.count * head_s
    in_vram, in_ram = hit_rates(
        routing.hits(spec, work), np.array([float(homes.vram_slots)]), np.array([float(homes.ram_slots)])
    )
    rates = float(in_vram[0]), float(in_ram[0])
    for kind in layer_kinds(spec):
        for (vram, kv), times in _places(kind, homes).items():
            cost = layer_cost(spec, kind.layer, profile, work, dense_vram=vram, kv_vram=kv)
            if kind.experts is None:
                total.add_dense(cost, times * work.count)
            else:
                need, decode = routing.demand(kind.experts, work), work.new_tokens == 1
                # What the CPU computes of the layer beside its experts, it computes between two layers' reads.
                longer = 1 + float(longer_after_reads(profile, need, in_vram + in_ram)[0]) if decode else 1.0
                cost = replace(
                    cost, dense_s=cost.dense_s * (1.0 if vram else longer),
                    attention_s=cost.attention_s * (1.0 if kv else longer),
                )  # fmt: skip
                total.add_dense(cost, times * work.count)
                experts = expert_cost(
                    kind.experts, profile, homes, need, work.rows, in_vram, in_ram, on_gpu=vram, decode=decode
                )
                total.add_experts(experts, need.distinct, rates, kind.experts.layout.nbytes, times * work.count)
    # Streamed layers are spread evenly and come while others compute: a pass waits for what the link then has left.
    total.link_busy_s += work.count * streamed_s(spec, profile, homes)
    wait_s = (total.link_busy_s - link_before_s) - (total.terms.total_s - before_s)
    if homes.dense_streamed and wait_s > 0:
        total.terms = total.terms.plus(Terms(link_s=wait_s))


def _places(kind: LayerKind, homes: Homes) -> Counter[tuple[bool, bool]]:
    """Layers of a kind by where their (dense weights, KV cache) are."""
    vram, kv = set(homes.dense_in_vram), set(homes.kv_in_vram)
    return Counter((index in vram, index in kv) for index in kind.indices)
