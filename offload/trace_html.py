"""A routing trace as one HTML file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from offload.report_page import COLOURS, paragraphs, write_page
from offload.trace_summary import TraceSummary
from placement.trace_analysis import expert_counts
from prefetch.traces.trace import RoutingTrace


def write_trace_html(file: Path, trace: RoutingTrace, found: TraceSummary) -> None:
    """Write the report of a trace.

    Args:
        file: overwritten.
        trace: the trace.
        found: its figures.

    Raises:
        OSError: the file cannot be written.
    """
    popularity = found.popularity
    notes = [
        f"{found.layers} layers, {found.experts} experts, top {found.top_k}; {found.tokens} tokens in {found.passes} "
        f"passes, {found.decode_tokens} of them decoded.",
        f"Popularity like rank^-{popularity.skew:.2f}; {popularity.locality:.0%} of a token's experts are the token's "
        f"before, beyond chance. The busiest tenth of a layer's experts get {found.busiest_tenth:.0%} of its tokens.",
    ]
    figures = [("Experts by popularity: how often each is needed, beside an equal share", _popularity(trace))]
    if found.hits:
        figures.append(("Hit rate of decode by size of the cache", _hits(found)))
    write_page(file, f"Routing of {found.name}", paragraphs(notes), figures)


def _popularity(trace: RoutingTrace) -> go.Figure:
    """Layers by ranks; the colour is the share of tokens over that of an equal choice."""
    counts = expert_counts(trace)
    widest = max(map(len, counts))
    shares = np.full((len(counts), widest), np.nan)
    experts = np.full((len(counts), widest), "", dtype=object)
    for layer, one in enumerate(counts):
        order = np.argsort(-one, kind="stable")
        shares[layer, : len(one)] = one[order] * len(one) / max(1, one.sum())
        experts[layer, : len(one)] = [f"expert {expert}" for expert in order]
    figure = go.Figure(
        go.Heatmap(z=shares, text=experts, colorscale="Viridis", hovertemplate="layer %{y}, %{text}: %{z:.2f}")
    )
    figure.update_traces(colorbar={"title": {"text": "times the equal share"}})
    return figure.update_layout(
        xaxis_title="expert, by rank of popularity", yaxis_title="MoE layer", height=200 + 6 * len(counts)
    )


def _hits(found: TraceSummary) -> go.Figure:
    figure = go.Figure()
    slots = [point.slots for point in found.hits]
    for (name, label), colour in zip(
        (("belady", "best possible (Belady)"), ("lru", "LRU"), ("popularity", "LRU by popularity alone")),
        COLOURS,
        strict=False,
    ):
        rates = [getattr(point, name) for point in found.hits]
        figure.add_scatter(x=slots, y=rates, name=label, mode="lines+markers", line_color=colour)
    return figure.update_layout(xaxis_title="slots", yaxis_title="hit rate", yaxis_range=[0, 1.02], height=380)
