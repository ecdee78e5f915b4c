from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable

import pytest

from offload.progress import TerminalProgress, progress_bar
from offload.store.progress import NoProgress

HIDE, SHOW, CLEAR = "\x1b[?25l", "\x1b[?25h", "\x1b[2K"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


Watch = Callable[[], Terminal]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Makes stderr a terminal of 100 columns; called in the test because pytest replaces stderr before each."""
    for name in ("NO_COLOR", "HF_HUB_DISABLE_PROGRESS_BARS", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")

    def attach() -> Terminal:
        made = Terminal()
        monkeypatch.setattr(sys, "stderr", made)
        return made

    return attach


def last_line(text: str) -> str:
    return text.replace(SHOW, "").rstrip("\n").rsplit("\r", 1)[-1].rsplit("\n", 1)[-1].replace(CLEAR, "")


def test_shown_only_where_somebody_looks(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    watch()
    assert isinstance(progress_bar(), TerminalProgress)
    assert isinstance(progress_bar(False), NoProgress)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    assert isinstance(progress_bar(), NoProgress)
    assert isinstance(progress_bar(True), TerminalProgress)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(progress_bar(), NoProgress)


def test_bytes_rate_and_time_are_shown(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch()
    monkeypatch.setenv("NO_COLOR", "1")
    bar = TerminalProgress()
    bar.start(3 << 20, "converting a model")
    bar.advance(1 << 20)
    bar.advance(2 << 20)
    bar.finish()
    line = last_line(terminal.getvalue())
    assert line.startswith("converting a model ")
    assert "3.0/3.0 MiB" in line
    assert "iB/s" in line
    assert line.rstrip().endswith("0:00:00")
    assert terminal.getvalue().count(HIDE) == terminal.getvalue().count(SHOW) == 1
    assert "\n" in terminal.getvalue()


def test_an_unknown_amount_pulses_and_leaves_nothing(watch: Watch) -> None:
    terminal = watch()
    bar = TerminalProgress()
    bar.start(0, "waiting for process 7")
    assert "waiting for process 7" in terminal.getvalue()
    assert "0/" not in terminal.getvalue()
    bar.finish()
    after = terminal.getvalue().rsplit("waiting for process 7", 1)[1]
    assert CLEAR in after
    assert terminal.getvalue().count(HIDE) == terminal.getvalue().count(SHOW)


def test_one_object_shows_one_task_after_the_other(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch()
    monkeypatch.setenv("NO_COLOR", "1")
    bar = TerminalProgress()
    bar.advance(1)
    bar.finish()
    assert terminal.getvalue() == ""
    for index in range(3):
        start = len(terminal.getvalue())
        bar.start(10, f"task {index}")
        bar.advance(4)
        bar.finish()
        bar.finish()
        shown = terminal.getvalue()[start:]
        assert f"task {index}" in last_line(shown)
        assert "4/10 bytes" in last_line(shown)
        # Moving the cursor up would draw over the line of the task before.
        assert "\x1b[1A" not in shown
    assert terminal.getvalue().count(HIDE) == terminal.getvalue().count(SHOW) == 3


def test_start_without_finish_ends_the_task_before(watch: Watch) -> None:
    terminal = watch()
    bar = TerminalProgress()
    bar.start(10, "first")
    bar.start(10, "second")
    bar.finish()
    assert terminal.getvalue().count(HIDE) == terminal.getvalue().count(SHOW) == 2


def test_streams_are_as_before_after_a_failure(watch: Watch) -> None:
    terminal = watch()
    bar, stdout = TerminalProgress(), sys.stdout
    bar.start(10, "work")
    assert sys.stdout is stdout
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        bar.finish()
    assert sys.stderr is terminal
    assert terminal.getvalue().endswith(SHOW)


@pytest.mark.parametrize("total", [0, 10])
@pytest.mark.parametrize("name", ["a [bold] name", "/path/[/x]/model", "x" * 300])
def test_any_description(watch: Watch, monkeypatch: pytest.MonkeyPatch, name: str, total: int) -> None:
    terminal = watch()
    monkeypatch.setenv("NO_COLOR", "1")
    bar = TerminalProgress()
    bar.start(total, name)
    bar.advance(10)
    bar.finish()
    assert name[:30] in terminal.getvalue()
    if total:
        assert "10/10 bytes" in last_line(terminal.getvalue())


def test_a_file_gets_one_line_per_task(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    bar = TerminalProgress()
    bar.start(0, "waiting for [bold] process 7")
    bar.finish()
    bar.start(1 << 20, "converting")
    bar.advance(1 << 20)
    bar.finish()
    first, second = file.getvalue().splitlines()
    assert first == "waiting for [bold] process 7"
    assert second.startswith("converting ")
    assert "\x1b" not in file.getvalue()


def test_advance_from_many_threads(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch()
    monkeypatch.setenv("NO_COLOR", "1")
    bar = TerminalProgress()
    bar.start(4000, "reading")
    threads = [threading.Thread(target=lambda: [bar.advance(1) for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bar.finish()
    assert "3.9/3.9 KiB" in last_line(terminal.getvalue())
