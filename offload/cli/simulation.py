"""`offload plan --simulate`: a plan run against a trace, event by event."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from offload.cli.output import add_row, table, write
from offload.errors import InvalidArgumentError

if TYPE_CHECKING:
    from placement.hardware_profile import HardwareProfile
    from placement.model_spec import ModelSpec
    from placement.plan import Plan
    from placement.simulator.simulate import Phase, Simulation
    from prefetch.traces.trace import RoutingTrace

_Command = TypeVar("_Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--simulate", is_flag=True, help="Also run the plan event by event, on the trace or a synthetic one."),
    click.option(
        "--locality",
        type=click.FloatRange(0, 10),
        default=0.0,
        show_default=True,
        help="Of the synthetic trace: added to the logits of the experts of the token before.",
    ),
    click.option("--policy", default="auto", show_default=True, help="Cache policy that is simulated."),
    click.option(
        "--timeline",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Write the last simulated passes as Chrome's JSON, for ui.perfetto.dev.",
    ),
)

_NEW_TOKENS = 128
_TIMELINE_PASSES = 4


def simulation_options(command: _Command) -> _Command:
    """--simulate and what goes with it."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class Simulate:
    """What is to be simulated; see the help texts."""

    skew: float
    trace: Path | None
    locality: float
    policy: str
    timeline: Path | None

    @classmethod
    def asked(cls, options: dict[str, Any]) -> Simulate | None:
        """Taken from a command's options, None where nothing is to be simulated.

        Raises:
            InvalidArgumentError: an option that needs --simulate without it.
        """
        wanted, locality = options.pop("simulate"), options.pop("locality")
        policy, timeline = options.pop("policy"), options.pop("timeline")
        if not wanted:
            if timeline is not None or locality or policy != "auto":
                raise InvalidArgumentError("--timeline, --locality and --policy go with --simulate")
            return None
        if locality and options["trace"] is not None:
            raise InvalidArgumentError("--locality is of a synthetic trace, and --trace gives a recorded one")
        return cls(options["skew"] or 0.0, options["trace"], locality, policy, timeline)

    def run(self, spec: ModelSpec, profile: HardwareProfile | None, plan: Plan) -> Simulation:
        """Simulate a plan.

        Raises:
            InvalidArgumentError: no profile, no experts, an unknown policy, or another model's trace.
            StorageError: the timeline cannot be written.
        """
        from offload.written_files import write_whole
        from placement.simulator.machine import chrome_trace
        from placement.simulator.simulate import homes_of, simulate
        from prefetch.policies.geometry import Geometry
        from prefetch.policies.named import UnknownPolicyError, make_policy
        from prefetch.traces.trace import TraceError

        if profile is None:
            raise InvalidArgumentError("a simulation needs a profile of this machine: run `offload profile` once")
        if not spec.experts:
            raise InvalidArgumentError(
                f"--simulate: {spec.name} is a dense model without experts to simulate; its prediction is all there is"
            )
        try:
            policy = make_policy(self.policy, Geometry(tuple(layer.count for layer in spec.experts)))
            trace = self._trace(spec, plan)
            recorded = range(trace.passes - _TIMELINE_PASSES, trace.passes) if self.timeline is not None else ()
            found = simulate(
                spec, profile, homes_of(plan), trace, policy=policy, batch=plan.workload.batch, recorded=recorded
            )
        except (UnknownPolicyError, TraceError) as error:
            raise InvalidArgumentError(str(error)) from error
        if self.timeline is not None:
            told = json.dumps(chrome_trace(found.spans, f"{plan.model}, simulated"))
            write_whole(self.timeline, told.encode())
        return found

    def _trace(self, spec: ModelSpec, plan: Plan) -> RoutingTrace:
        from offload.traces import read_trace
        from prefetch.traces.synthetic import SyntheticRouting, draw
        from prefetch.traces.trace import TraceError

        if self.trace is not None:
            return read_trace(self.trace)
        alike = {(layer.count, layer.top_k) for layer in spec.experts}
        if len(alike) > 1:
            raise TraceError(f"{spec.name}: its layers differ in experts; a synthetic trace cannot, so give --trace")
        experts, top_k = alike.pop()
        routing = SyntheticRouting(
            len(spec.experts), experts, min(top_k, experts), skew=self.skew, locality=self.locality, topic=0.0
        )
        work = plan.workload
        return draw(
            routing, min(work.prompt_tokens, work.context_tokens), _NEW_TOKENS, 0, batch=work.batch,
            chunk=work.prefill_chunk_tokens,
        )  # fmt: skip


def write_plan_json(plan: Plan, simulation: Simulation | None) -> None:
    """The plan on stdout; with a simulation one object of both."""
    if simulation is None:
        click.echo(plan.to_json())
        return
    phases = {name: _plain(getattr(simulation, name)) for name in ("decode", "prefill")}
    both = {"plan": json.loads(plan.to_json()), "simulation": {**phases, "events": simulation.events}}
    click.echo(json.dumps(both, indent=2))


def _plain(phase: Phase) -> dict[str, Any]:
    names = ("passes", "tokens", "seconds", "tokens_per_s", "experts", "in_vram", "in_ram", "hit_rate", "utilisation")
    return {name: getattr(phase, name) for name in names}


def write_simulation(simulation: Simulation, plan: Plan) -> None:
    """A table on stdout."""
    rows = table("simulated", "tokens/s", "predicted", "hits", "predicted hits", "cpu", "gpu", "link", "disk")
    for name in ("decode", "prefill"):
        phase: Phase = getattr(simulation, name)
        told = None if plan.prediction is None else getattr(plan.prediction, name)
        predicted = ("", "") if told is None else (
            f"{told.tokens_per_s:.2f}", f"{told.vram_hit_rate + told.ram_hit_rate:.0%}"
        )  # fmt: skip
        if phase.passes:
            cells = [f"{phase.tokens_per_s:.2f}", predicted[0], f"{phase.hit_rate:.0%}", predicted[1]]
            add_row(rows, name, *cells, *(f"{share:.0%}" for share in phase.utilisation.values()))
    write("", rows, "", f"{simulation.events} expert events; the columns of parts are shares of the time they work")
