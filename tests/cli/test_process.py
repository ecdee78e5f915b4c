"""What only a process of its own shows: signals, pipes, and what is imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import PROMPT

COMMAND = [sys.executable, "-m", "offload.cli"]


def start(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, *(str(argument) for argument in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background jobs ignore it, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["store", "ls"]])
def test_nothing_heavy_is_imported_without_need(arguments: list[str], tmp_path: Path) -> None:
    script = f"""
import sys
from offload.cli import cli
try:
    cli({arguments!r}, prog_name="offload")
finally:
    heavy = {{"torch", "transformers", "numba", "huggingface_hub"}} & set(sys.modules)
    assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "offload" in done.stdout


def test_every_help_shows_an_example() -> None:
    from offload.cli import cli
    from offload.cli.store import store_commands
    from offload.cli.trace import trace_commands

    assert set(cli.commands) == {"run", "plan", "bench", "profile", "quantize", "store", "trace"}
    assert set(store_commands.commands) == {"ls", "verify", "rm"}
    assert set(trace_commands.commands) == {"record", "show"}
    commands = {**cli.commands, **store_commands.commands, **trace_commands.commands}
    for command in (cli, *commands.values()):
        assert "Example:\n  offload " in (command.epilog or "")


@pytest.mark.parametrize("how", ["ctrl-c", "closed pipe"])
def test_the_end_of_a_long_text(checkpoint: Path, shared_store: Path, expected: str, how: str) -> None:
    process = start("run", checkpoint, "-p", PROMPT, "--ram", "100MiB", "--nvme", shared_store, "-n", 50_000)
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)
    if how == "closed pipe":
        process.stdout.close()
        process.stdout = None
        code, _, error = finish(process)
        assert code == 141
    else:
        process.send_signal(signal.SIGINT)
        code, rest, error = finish(process)
        assert code == 130
        text = (first + rest).decode()
        assert text.endswith("\n")
        assert expected.startswith(text[:-1][:40])
        assert b"tokens/s" in error
    assert b"Traceback" not in error
    assert b"Exception ignored" not in error


def test_ctrl_c_before_any_text(checkpoint: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "prompt"
    os.mkfifo(fifo)
    process = start("run", checkpoint, "--prompt-file", fifo, "--nvme", tmp_path)
    # Opening waits until the command reads the prompt, which does not come.
    with fifo.open("wb"):
        process.send_signal(signal.SIGINT)
        code, out, error = finish(process)
    assert (code, out, error.strip()) == (130, b"", b"Interrupted.")
