"""How many expert events the simulator of plans plays in a second of one CPU, gated on hits that equal the replayed
policy's.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import process_time

from benchmarks.harness import Report, Row, Spread, say
from formats.bundle import BundleLayout
from placement.datasheets import datasheet
from placement.hardware_profile import HardwareProfile
from placement.model_spec import ExpertsSpec, LayerSpec, LinearSpec, ModelSpec
from placement.planner import make_plan
from placement.simulator.simulate import homes_of, simulate
from placement.tier_planner import make_tiered_plan
from placement.workload import Workload
from prefetch.policies.named import make_policy
from prefetch.traces.replay import replay
from prefetch.traces.synthetic import SyntheticRouting, draw
from prefetch.traces.trace import RoutingTrace

_VRAM_NBYTES = 8 << 30


@dataclass(frozen=True)
class SimulatorScale:
    """What is simulated: a synthetic trace of a model of so many layers and experts."""

    layers: int
    experts: int
    top_k: int
    new_tokens: int
    rounds: int


FULL = SimulatorScale(48, 128, 8, 256, 3)
QUICK = SimulatorScale(4, 16, 2, 16, 2)


def run(scale: SimulatorScale) -> Report:
    """The benchmark."""
    report = Report("simulator")
    routing = SyntheticRouting(scale.layers, scale.experts, scale.top_k, skew=0.6, locality=1.0)
    say("drawing a trace")
    trace = draw(routing, 64, scale.new_tokens, 0)
    spec = _spec(scale)
    rows: list[Row] = []
    slowest = float("inf")
    for parts, profile, vram in (
        ("CPU, disk", datasheet(cpu="ddr5-desktop", drive="gen4"), 0),
        ("CPU, GPU, link, disk", datasheet(gpu="rtx4090"), _VRAM_NBYTES),
    ):
        for policy in ("lru", "forecast"):
            for share in (0.3, 0.7, 1.0):
                say(f"{parts}, {policy}, {share:.0%} of experts")
                row, speed = _run(report, spec, profile, vram, trace, policy, share, scale)
                rows.append({"parts": parts, "policy": policy, "experts with a slot": f"{share:.0%}", **row})
                slowest = min(slowest, speed) if policy == "lru" else slowest
    report.tables["Expert events"] = rows
    report.target("expert events a second with LRU, at least", slowest, "at least", 100_000)
    report.notes.append(
        f"{trace.name}; {trace.passes} passes. One thread; seconds of its CPU, so that other work does not count; no "
        "model is run."
    )
    return report


def _run(
    report: Report,
    spec: ModelSpec,
    profile: HardwareProfile,
    vram: int,
    trace: RoutingTrace,
    policy: str,
    share: float,
    scale: SimulatorScale,
) -> tuple[Row, float]:
    work = Workload(1024, prompt_tokens=64, new_tokens=scale.new_tokens)
    everything = make_plan(spec, work, 1 << 50)
    slots = max(2, round(share * everything.expert_count))
    ram = everything.peak_ram_nbytes - everything.ram.slot_nbytes + slots * everything.slot_nbytes
    homes = homes_of(make_tiered_plan(spec, profile, work, ram, vram))
    speeds, found = [], None
    for _ in range(scale.rounds):
        fresh = make_policy(policy, trace.geometry)
        before = process_time()
        found = simulate(spec, profile, homes, trace, policy=fresh, warm=0)
        speeds.append(found.events / (process_time() - before))
    assert found is not None
    # Where every expert has a slot the runtime preloads, and a replay begins empty.
    if not vram and homes.ram_slots < spec.expert_count:
        expected = replay(trace, make_policy(policy, trace.geometry), homes.ram_slots)
        same = (found.decode.in_ram, found.prefill.in_ram) == (expected.decode_hits, expected.prefill_hits)
        report.gate(f"hits, {policy}, {share:.0%}", same, f"{expected.decode_hits} of decode")
    return {
        "events": found.events,
        "events a second": Spread.of(speeds),
        "hit rate": found.decode.hit_rate,
        "simulated tokens/s": found.decode.tokens_per_s,
    }, Spread.of(speeds).median


def _spec(scale: SimulatorScale) -> ModelSpec:
    """A model of the width of Qwen3-30B-A3B in int4."""
    hidden, layout = 2048, BundleLayout(2048, 768, "int4")
    linears = (LinearSpec(4096, hidden, "int4"), LinearSpec(512, hidden, "int4", 2), LinearSpec(hidden, 4096, "int4"))
    nbytes = sum(one.nbytes for one in linears)
    head = LinearSpec(32000, hidden, "int8")
    return ModelSpec(
        name="synthetic",
        model_type="qwen3_moe",
        dtype="bf16",
        dense_format="int4",
        head_format="int8",
        vocab_size=32000,
        hidden_size=hidden,
        layer_count=scale.layers,
        max_context_tokens=4096,
        dense_nbytes=scale.layers * nbytes + 2 * head.nbytes,
        load_scratch_nbytes=head.nbytes,
        kv_nbytes_per_token=2048 * scale.layers,
        kv_fixed_nbytes=0,
        activation_nbytes_per_token=20 * hidden,
        attention_nbytes_per_token=16384,
        experts=tuple(
            ExpertsSpec(f"layers.{i}.experts", scale.experts, scale.top_k, layout) for i in range(scale.layers)
        ),
        layers=tuple(LayerSpec(nbytes, linears, 2048, 8192, None, index) for index in range(scale.layers)),
        head=head,
        head_is_shared=False,
    )
