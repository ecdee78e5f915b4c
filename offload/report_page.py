"""The frame of reports: one HTML file that needs nothing else, with figures by plotly, whose code is in it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.io import to_html

from offload.written_files import write_whole

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #e3e6ea; }
.note { color: #57606a; }
"""


def write_page(file: Path, title: str, top: str, figures: Iterable[tuple[str, go.Figure]]) -> None:
    """Write a page.

    Args:
        file: replaced when the page is whole.
        title: of the page.
        top: HTML above the figures.
        figures: each with its heading.

    Raises:
        StorageError: the file cannot be written.
    """
    parts = [
        f"<h2>{html.escape(heading)}</h2>{_figure(figure, first=number == 0)}"
        for number, (heading, figure) in enumerate(figures)
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{top}{''.join(parts)}</body></html>\n"
    )
    write_whole(file, page.encode())


def paragraphs(sentences: Iterable[str]) -> str:
    """Notes, one under another."""
    return "".join(f'<p class="note">{html.escape(sentence)}</p>' for sentence in sentences)


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain text."""
    cells = [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    titles = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><tr>{titles}</tr>{''.join(cells)}</table>"


def _figure(figure: go.Figure, *, first: bool) -> str:
    figure.update_layout(
        margin={"l": 20, "r": 20, "t": 20, "b": 40}, template="plotly_white", legend_traceorder="normal"
    )
    text: str = to_html(figure, include_plotlyjs=first, full_html=False, config={"displaylogo": False})
    return text
