"""A plan as one HTML file that needs nothing else: figures by plotly, whose code is in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from offload.plan_words import dense_in_words, formats_in_words
from offload.report_page import COLOURS, html_table, paragraphs, write_page
from offload.sizes import format_size
from placement.model_spec import ModelSpec
from placement.plan import Plan
from placement.predict import Routing
from placement.prediction import Prediction
from placement.rig import Change, Rig, in_words, loaded_in_words, sweep
from placement.routing import residency

_HOMES = (("disk", "#d0d4da"), ("RAM", "#f5b971"), ("VRAM", "#54a24b"))

_BASIS = {"measured": "as it was measured", "datasheet": "from datasheets"}


def write_html(
    file: Path,
    spec: ModelSpec,
    plan: Plan,
    rig: Rig,
    routing: Routing | None,
    changes: Sequence[Change],
    doubling: tuple[Change | None, Change],
) -> None:
    """Write the report.

    Args:
        file: overwritten.
        spec: the model.
        plan: with a prediction.
        rig: what it was planned for.
        routing: what is known of the experts' popularity.
        changes: other rigs to show beside it.
        doubling: see `cheapest_doubling`.

    Raises:
        OSError: the file cannot be written.
        ValueError: the plan has no prediction.
    """
    if plan.prediction is None:
        raise ValueError("a report needs a plan with a prediction")
    figures = [
        ("Memory by tier", _tiers(plan)),
        ("Seconds per token, and what they are spent on", _terms(plan.prediction)),
        *([("Where experts are most of the time", _homes(spec, plan, routing))] if spec.experts else []),
        *_curves(sweep(rig, plan, spec, routing), plan),
    ]
    # A dense model's plan is what is loaded.
    placed = plan.vram is not None and plan.expert_count
    loaded = loaded_in_words(rig, spec, plan.workload, routing) if placed else None
    summary = _summary(plan, plan.prediction, doubling, loaded, len(spec.layers))
    top = summary + _speeds(plan, plan.prediction, changes) + _memory(plan)
    write_page(file, f"Plan of {plan.model}", top, figures)


def _summary(
    plan: Plan, prediction: Prediction, doubling: tuple[Change | None, Change], loaded: str | None, layers: int
) -> str:
    sentences = [
        f"{formats_in_words(plan)}; "
        f"{plan.workload.batch} x {plan.workload.context_tokens} tokens of context, prompt of "
        f"{plan.workload.prompt_tokens}.",
        f"A prediction for {prediction.profile}, {_BASIS[prediction.basis]}; nothing was run. "
        f"Routing: {prediction.routing}.",
    ]
    if plan.expert_count:
        sentences.append(f"All {plan.expert_count} experts lie on disk: {format_size(plan.disk_nbytes)}.")
    else:
        sentences.append(f"Dense weights: {dense_in_words(plan, layers)}.")
    sentences.append(f"The cheapest change that doubles the speed of decode: {in_words(doubling)}.")
    if loaded is not None:
        sentences.append(
            f"This plan of VRAM is the fastest by predicted seconds. offload.load places by sizes: {loaded}."
        )
    return paragraphs(sentences)


def _speeds(plan: Plan, prediction: Prediction, changes: Sequence[Change]) -> str:
    rows: list[tuple[str, ...]] = []
    for name, one in (("decode", prediction.decode), ("prefill", prediction.prefill)):
        slow, fast = one.tokens_per_s_range
        hits = f"{one.vram_hit_rate:.0%}", f"{one.ram_hit_rate:.0%}"
        rows.append((name, f"{one.tokens_per_s:.2f}", f"{slow:.2f} to {fast:.2f}", one.binds, *hits))
    for option in plan.format_options:
        rows.append((f"in {option.in_words}", option.speed_in_words, "", "", "", ""))
    for change in changes:
        rows.append((f"decode, if {change.name}", f"{change.decode_tokens_per_s:.2f}", "", "", "", ""))
    head = ("", "tokens/s", "range", "bound by", "found in VRAM", "found in RAM")
    return html_table(head, rows)


def _uses(plan: Plan) -> list[tuple[str, Any, int, int]]:
    """(tier, what is in it, expert slots, budget)."""
    found: list[tuple[str, Any, int, int]] = [("RAM", plan.ram, plan.ram_slots, plan.ram_budget_nbytes)]
    if plan.vram is not None:
        found.append(("VRAM", plan.vram.use, plan.vram.slots, plan.vram.budget_nbytes))
    return found


def _memory(plan: Plan) -> str:
    """Peak bytes by tier."""
    head = ("", "dense weights", "KV cache", "activations", "expert slots", "peak", "allowed")
    rows = []
    for name, use, slots, budget in _uses(plan):
        sizes = [format_size(getattr(use, f"{part}_nbytes")) for part in ("dense", "kv", "activation")]
        slot = f"{slots} of {plan.expert_count}: {format_size(use.slot_nbytes)}"
        rows.append((name, *sizes, slot, format_size(use.total_nbytes), format_size(budget)))
    return html_table(head, rows)


def _tiers(plan: Plan) -> go.Figure:
    uses = [(name, use, budget) for name, use, _, budget in _uses(plan)]
    names = [f"{name}, {format_size(budget)} allowed" for name, _, budget in uses]
    figure = go.Figure()
    parts = (("dense weights", "dense"), ("KV cache", "kv"), ("activations", "activation"), ("expert slots", "slot"))
    for (label, part), colour in zip(parts, COLOURS, strict=False):
        sizes = [getattr(use, f"{part}_nbytes") / (1 << 30) for _, use, _ in uses]
        figure.add_bar(y=names, x=sizes, name=label, orientation="h", marker_color=colour)
    free = [max(0.0, (budget - use.total_nbytes) / (1 << 30)) for _, use, budget in uses]
    figure.add_bar(y=names, x=free, name="free", orientation="h", marker_color="#eceff2")
    return figure.update_layout(barmode="stack", xaxis_title="GiB", height=130 + 70 * len(uses))


def _terms(prediction: Prediction) -> go.Figure:
    figure = go.Figure()
    names = ["decode, a token", "prefill, a token"]
    per_token = [
        {term: seconds / one.tokens for term, seconds in one.terms.as_dict().items()}
        for one in (prediction.decode, prediction.prefill)
    ]
    for term, colour in zip(per_token[0], COLOURS, strict=True):
        values = [1e3 * one[term] for one in per_token]
        figure.add_bar(y=names, x=values, name=term.replace("_", " "), orientation="h", marker_color=colour)
    return figure.update_layout(barmode="stack", xaxis_title="milliseconds", height=270)


def _homes(spec: ModelSpec, plan: Plan, routing: Routing | None) -> go.Figure:
    """A layer's experts by rank of popularity; the colour is the tier in which one is most of the time."""
    routing = Routing() if routing is None else routing
    layers = [(layer.count, min(layer.top_k, layer.count)) for layer in spec.experts]
    slots = plan.vram.slots if plan.vram is not None else 0
    vram = residency(layers, routing.popularity, slots) if slots else [np.zeros(count) for count, _ in layers]
    cached = residency(layers, routing.popularity, slots + plan.ram_slots)
    widest = max(count for count, _ in layers)
    home = np.full((len(layers), widest), np.nan)
    said = np.full((len(layers), widest), "", dtype=object)
    for row, (there, either) in enumerate(zip(vram, cached, strict=True)):
        here = np.maximum(either - there, 0.0)
        disk = 1 - np.maximum(either, there)
        home[row, : len(there)] = np.select([(there >= here) & (there >= disk), here >= disk], [1.0, 0.5], 0.0)
        for rank, shares in enumerate(zip(there, here, disk, strict=True)):
            said[row, rank] = "VRAM {:.0%}, RAM {:.0%}, disk alone {:.0%}".format(*shares)
    steps = [(edge / len(_HOMES), colour) for n, (_, colour) in enumerate(_HOMES) for edge in (n, n + 1)]
    bar = {"tickvals": [1 / 6, 1 / 2, 5 / 6], "ticktext": [name for name, _ in _HOMES], "len": 0.6}
    figure = go.Figure(
        go.Heatmap(z=home, text=said, colorscale=steps, zmin=0, zmax=1, colorbar=bar, hovertemplate="%{text}")
    )
    figure.update_yaxes(autorange="reversed")
    height = 200 + 6 * len(layers)
    return figure.update_layout(xaxis_title="expert, by rank of popularity", yaxis_title="MoE layer", height=height)


def _curves(found: dict[str, list[tuple[int, float]]], plan: Plan) -> list[tuple[str, go.Figure]]:
    """Each with a line where this plan is."""
    now = {"ram": plan.ram_budget_nbytes, "context": plan.workload.context_tokens}
    now["vram"] = plan.vram.budget_nbytes if plan.vram is not None else 0
    made = []
    for name, points in found.items():
        if not points:
            continue
        scale, unit = (1, "tokens") if name == "context" else (1 << 30, "GiB")
        figure = go.Figure(
            go.Scatter(
                x=[x / scale for x, _ in points], y=[y for _, y in points], mode="lines+markers",
                line_color=COLOURS[0],
            )
        )  # fmt: skip
        label = "context" if name == "context" else name.upper()
        figure.add_vline(
            x=now[name] / scale,
            line_dash="dot",
            line_color="#8c959f",
            annotation_text="this plan",
            annotation_position="bottom right",
        )
        figure.update_layout(xaxis_title=unit, yaxis_title="tokens/s", height=320)
        figure.update_yaxes(rangemode="tozero")
        made.append((f"Decode by {label}; 0 where it does not fit", figure))
    return made
