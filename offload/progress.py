"""Progress bars on the terminal: bytes, rate, time left. Silent where nobody looks."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from offload.sizes import format_size
from offload.store.progress import NoProgress, Progress

_MEASURES_WIDTH = 50
"""Columns of a terminal that bytes, rate, time and a short bar take."""

_TRUE = {"1", "on", "yes", "true"}


def progress_bar(show: bool | None = None) -> Progress:
    """A bar on stderr, or nothing.

    Args:
        show: True or False to say so; None for a bar where stderr is a terminal and HF_HUB_DISABLE_PROGRESS_BARS is
            not set.
    """
    if show is None:
        disabled = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").lower() in _TRUE
        show = sys.stderr.isatty() and not disabled
    return TerminalProgress() if show else NoProgress()


class TerminalProgress:
    """A rich progress bar for each task, one after the other; `advance` may come from any thread.

    A task of known size leaves its bar on the terminal, with the time that it took; one of unknown size leaves
    nothing. Where stderr is a file, it gets one line per task.
    """

    def __init__(self) -> None:
        self._bar: RichProgress | None = None

    def start(self, total_bytes: int, description: str) -> None:
        """Show a bar at nothing of `total_bytes`; 0 is an unknown amount, shown as a pulse."""
        self.finish()
        console = Console(stderr=True)
        if not total_bytes and not console.is_terminal:
            console.print(description, markup=False, highlight=False, soft_wrap=True)
            return
        # Markup is off because a path may have brackets. stdout is left alone: what others print there is not for us.
        name = TextColumn("{task.description}", markup=False, table_column=_column(console.width - _MEASURES_WIDTH))
        measures: tuple[ProgressColumn, ...] = (
            (
                DownloadColumn(binary_units=True, table_column=_column()),
                _RateColumn(table_column=_column()),
                TimeRemainingColumn(elapsed_when_finished=True, table_column=_column()),
            )
            if total_bytes
            else (TimeElapsedColumn(table_column=_column()),)
        )
        # A display that was stopped would draw over its last line when started again.
        self._bar = RichProgress(
            name,
            BarColumn(),
            *measures,
            console=console,
            transient=not total_bytes,
            redirect_stdout=False,
        )
        self._bar.add_task(description, total=total_bytes or None)
        self._bar.start()

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], nbytes)

    def finish(self) -> None:
        """End the task; the cursor is at the start of a line again. Does nothing where no task was started."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()


def _column(max_width: int | None = None) -> Column:
    """One line high, cut where it is too wide: the bar gives way first."""
    return Column(no_wrap=True, overflow="ellipsis", max_width=None if max_width is None else max(max_width, 12))


class _RateColumn(ProgressColumn):
    """Bytes per second, in the binary units of the other columns."""

    def render(self, task: Task) -> Text:
        # rich's own speed of a finished task leaves the time before the first step out.
        speed = task.completed / task.finished_time if task.finished_time else task.speed
        return Text(f"{format_size(int(speed))}/s" if speed else "", style="progress.data.speed")
