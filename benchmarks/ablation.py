"""HybriMoE's ablation: scheduling, prefetch and caching against a static mapping with all misses on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import torch

from benchmarks.ablation_execution import Execution
from benchmarks.ablation_machine import MODELS, Model
from benchmarks.ablation_simulation import Ints, Parts, Simulation
from benchmarks.harness import Report, Row, say
from prefetch.traces.synthetic import draw
from prefetch.traces.trace import RoutingTrace

PREFILL_TARGET, DECODE_TARGET = 1.33, 1.70
"""HybriMoE over kTransformers, averages of its evaluation."""

STATIC = Parts()
EXECUTED = {
    "all copied": Parts(copy_all=True),
    "scheduling": Parts(scheduling=True),
    "prefetch": Parts(prefetch=True),
    "all": Parts(scheduling=True, prefetch=True, caching=True),
}
COLUMNS = {
    "scheduling": Parts(scheduling=True),
    "prefetch": Parts(prefetch=True),
    "caching": Parts(caching=True),
    "all": Parts(scheduling=True, prefetch=True, caching=True),
}


@dataclass(frozen=True)
class AblationScale:
    """How much.

    Attributes:
        cached: shares of experts on the GPU.
        prefills: prompt tokens.
        new_tokens: decoded, of which `warm_tokens` are not counted.
        executed_layers, executed_tokens: of the models that are run; a quarter of the tokens is not counted.
        executed_prefill: prompt tokens there.
    """

    cached: tuple[float, ...]
    prefills: tuple[int, ...]
    new_tokens: int
    warm_tokens: int
    executed_layers: int
    executed_tokens: int
    executed_prefill: int


FULL = AblationScale((0.25, 0.5, 0.75), (32, 128, 512, 1024), 128, 32, 4, 24, 32)
QUICK = AblationScale((0.25,), (32,), 12, 4, 2, 4, 4)


def run(scale: AblationScale, models: tuple[Model, ...] = MODELS) -> Report:
    """The benchmark."""
    report = Report("ablation")
    rows: list[Row] = []
    for model in models:
        say(f"simulating {model.name}")
        texts = Texts(model, scale)
        for cached in scale.cached:
            rows.append(_row(texts, cached, "decode", texts.decode, scale.warm_tokens))
            rows += [_row(texts, cached, f"prefill {tokens}", texts.prefill(tokens), 0) for tokens in scale.prefills]
    report.tables["Simulated: speed over a static mapping"] = rows
    executed = [row for model in models for row in _executed(report, model, scale)]
    report.tables["Executed: speed over a static mapping"] = executed
    for kind, found in (("simulated", rows), ("executed", executed)):
        for phase, bound in (("prefill", PREFILL_TARGET), ("decode", DECODE_TARGET)):
            of_phase = [row for row in found if str(row["phase"]).startswith(phase)]
            report.target(f"{kind}, {phase}: all over static, mean", _mean(of_phase, "all"), "at least", bound)
            report.target(
                f"{kind}, {phase}: all over the better static mapping, mean",
                fmean(_number(row, "all") / max(1.0, _number(row, "all copied")) for row in of_phase),
                "at least",
                bound,
            )
    report.notes.append(
        "Costs of an A6000, PCIe 4.0 and 10 cores of a Xeon 5220R as stated in benchmarks/ablation_machine.py, none of "
        "them measured. Routing is synthetic, of one sequence. The static mapping holds the same share of each layer's "
        "experts, whatever they are, and leaves all misses to the CPU; `popular` holds those most popular in a "
        "calibration text; `all copied` copies all misses. Executed: the runtime's tiers, step, scheduler, copies "
        "ahead and link, with devices that take as long as the modelled ones, in fewer layers."
    )
    return report


class Texts:
    """One drawn sequence of a model, cut in parts: to calibrate on, to decode, to prefill."""

    def __init__(self, model: Model, scale: AblationScale) -> None:
        self.model = model
        self._start = 2 * scale.new_tokens
        self._drawn = draw(model.routing, 0, self._start + max(scale.prefills), seed=1)
        self.popular = by_popularity(self._part(0, scale.new_tokens, 1))
        self.decode = self._part(scale.new_tokens, scale.new_tokens, 1)

    def prefill(self, tokens: int) -> RoutingTrace:
        """A prompt."""
        return self._part(self._start, tokens, tokens)

    def _part(self, first: int, tokens: int, a_pass: int) -> RoutingTrace:
        passes = tokens // a_pass
        return replace(
            self._drawn,
            pass_tokens=np.full(passes, a_pass, np.int32),
            pass_prefill=np.full(passes, a_pass > 1),
            experts=self._drawn.experts[first : first + tokens],
        )


def by_popularity(trace: RoutingTrace) -> Ints:
    """int64 [layers, experts]: ids by how many tokens went there, descending."""
    layers, experts = trace.geometry.layers, trace.geometry.counts[0]
    counts = np.stack([np.bincount(trace.experts[:, layer].reshape(-1), minlength=experts) for layer in range(layers)])
    return np.argsort(-counts, axis=1, kind="stable").astype(np.int64)


def _row(texts: Texts, cached: float, phase: str, trace: RoutingTrace, warm: int) -> Row:
    any_experts = np.tile(np.arange(texts.model.experts), (texts.model.layers, 1))

    def seconds(parts: Parts, held: Ints) -> float:
        return Simulation(texts.model, cached, parts, held, seed=1).run(trace, warm)

    static_s = seconds(STATIC, any_experts)
    tokens = int(trace.pass_tokens[warm:].sum())
    row: Row = {
        "model": texts.model.name, "cached": f"{cached:.0%}", "phase": phase, "static, tokens/s": tokens / static_s,
        "popular": static_s / seconds(STATIC, texts.popular),
    }  # fmt: skip
    for name, parts in {"all copied": Parts(copy_all=True), **COLUMNS}.items():
        row[name] = static_s / seconds(parts, any_experts)
    return row


def _executed(report: Report, model: Model, scale: AblationScale) -> list[Row]:
    small = replace(model, layers=scale.executed_layers)
    texts = Texts(small, replace(scale, new_tokens=scale.executed_tokens, prefills=(scale.executed_prefill,)))
    warm, prompt = scale.executed_tokens // 4, scale.executed_prefill
    phases = {"decode": (texts.decode, warm), f"prefill {prompt}": (texts.prefill(prompt), 0)}
    rows: list[Row] = []
    for trace, first in phases.values():
        # Kernels compile, and caches and memory are touched, before anything is timed.
        for parts in (STATIC, EXECUTED["all"]):
            _execute(small, scale.cached[0], parts, trace, first)
    for cached in scale.cached:
        for phase, (trace, first) in phases.items():
            say(f"running {model.name}, {cached:.0%}, {phase}")
            row: Row = {"model": model.name, "cached": f"{cached:.0%}", "phase": phase}
            static_s, expected = _execute(small, cached, STATIC, trace, first)
            row["static, tokens/s"] = int(trace.pass_tokens[first:].sum()) / static_s
            for name, parts in EXECUTED.items():
                seconds, found = _execute(small, cached, parts, trace, first)
                same = all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
                report.gate(
                    f"{model.name}, {cached:.0%}, {phase}, {name}", same, "bits of the static mapping's outputs"
                )
                row[name] = static_s / seconds
            rows.append(row)
    return rows


def _execute(
    model: Model, cached: float, parts: Parts, trace: RoutingTrace, first: int
) -> tuple[float, list[torch.Tensor]]:
    execution = Execution(model, cached, parts)
    try:
        return execution.run(trace, first)
    finally:
        execution.close()


def _mean(rows: list[Row], column: str) -> float:
    return fmean(_number(row, column) for row in rows)


def _number(row: Row, column: str) -> float:
    value = row[column]
    assert isinstance(value, float)
    return value
