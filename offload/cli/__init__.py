"""The command line: `offload run`, `plan`, `bench`, `profile`, `trace`, `quantize` and `store`.

Text and reports go to stdout, all else to stderr. Nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import io
import sys
from importlib.metadata import PackageNotFoundError, version

import click

from offload.cli.bench import bench_command
from offload.cli.errors import EXIT_INTERRUPTED
from offload.cli.options import example
from offload.cli.plan import plan_command
from offload.cli.profile import profile_command
from offload.cli.quantize import quantize_command
from offload.cli.run import run_command
from offload.cli.store import store_commands
from offload.cli.trace import trace_commands


def _version() -> str:
    try:
        return version("moe-offload")
    except PackageNotFoundError:
        return "(not installed)"


_EXIT_CODES = """

\b
Exit codes: 0 ok, 1 failed, 2 usage, 3 does not fit, 4 bad model or store,
  5 input or output, 130 interrupted. OFFLOAD_DEBUG=1 shows tracebacks."""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=example(
        "offload plan ./Qwen3-30B-A3B --ram 16GiB",
        'offload run ./Qwen3-30B-A3B -p "The capital of France is" --ram 16GiB',
    )
    + _EXIT_CODES,
)
@click.version_option(_version(), message="offload %(version)s")
def cli() -> None:
    """Run Mixture-of-Experts models that do not fit in memory."""


for _command in (
    run_command, plan_command, bench_command, profile_command, trace_commands, quantize_command, store_commands,
):  # fmt: skip
    cli.add_command(_command)


def main() -> None:
    """Entry point of the console script; ends the process."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that is not UTF-8 shows "?" rather than ending a generation half-way.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        cli(prog_name="offload")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
