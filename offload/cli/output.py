"""What commands write to stdout: JSON and tables."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from offload.sizes import format_size

if TYPE_CHECKING:
    from placement.plan import Plan

# Lines as long as they are: a key that was wrapped could not be copied, nor read by a program.
_WIDTH = 4096


def write_json(value: Any) -> None:
    """Write one JSON object."""
    click.echo(json.dumps(value, indent=2))


def write(*parts: RenderableType) -> None:
    """Write tables and texts, in colour where stdout is a terminal and NO_COLOR is not set."""
    # Brackets and colons in a path are neither markup nor emoji.
    console = Console(file=sys.stdout, width=_WIDTH, highlight=False, markup=False, emoji=False)
    # Not printed directly: rich ends the process itself where a pipe is closed.
    with console.capture() as captured:
        console.print(Group(*parts))
    click.echo("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()), nl=False)


def table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """An empty table.

    Args:
        *columns: headings.
        numbers: those of them whose cells are set right.
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left")
    return made


def add_row(to: Table, *cells: str, style: str = "") -> None:
    """Add a row of plain text."""
    to.add_row(*(Text(cell) for cell in cells), style=style or None)


def facts(rows: dict[str, str]) -> Table:
    """Names and values, one pair per line."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="dim", no_wrap=True)
    made.add_column()
    for name, value in rows.items():
        add_row(made, name, value)
    return made


def kv_in_words(plan: Plan) -> str:
    """How a plan's KV cache lies."""
    if plan.kv is None:
        return f"{format_size(plan.kv_nbytes_per_token)} per token, grows in place"
    kv = plan.kv
    text = f"{format_size(kv.nbytes_per_token)} per token in {kv.format} blocks"
    if kv.lossy:
        text += f" (lossy beyond the newest {kv.recent_tokens} tokens)"
    if kv.sparsity is not None:
        text += f", attended to in part by {kv.sparsity} (lossy)"
    if kv.vram_tokens:
        text += f", the newest {kv.vram_tokens} tokens in VRAM"
    if kv.spills_at_tokens is None:
        return f"{text}, {'the others' if kv.vram_tokens else 'all'} in RAM"
    return f"{text}; beyond {kv.spills_at_tokens} tokens on disk, {format_size(kv.disk_nbytes)} at the full context"
