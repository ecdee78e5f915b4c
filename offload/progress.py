"""Progress bars on the terminal: bytes, rate, time left. Silent where nobody looks."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

from offload.store.progress import NoProgress, Progress

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
    """A rich progress bar."""

    def __init__(self) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", visible=False)

    def start(self, total_bytes: int, description: str) -> None:
        """Show the bar at nothing of `total_bytes`."""
        self._bar.reset(self._task, total=total_bytes, description=description, visible=True)
        self._bar.start()

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""
        self._bar.advance(self._task, nbytes)

    def finish(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()
