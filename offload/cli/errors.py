"""From exceptions to exit codes and one readable message."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from offload.errors import DoesNotFitError, OffloadError, StorageError

EXIT_FAILED = 1
EXIT_STORAGE = StorageError.exit_code
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""What a shell reports of any program that writes to a pipe nobody reads."""


@contextmanager
def exit_codes(*, as_json: bool = False) -> Iterator[None]:
    """Run a command's body; whatever it raises ends the command with the exit code of its kind.

    The message goes to stderr, with a traceback where OFFLOAD_DEBUG is set.

    Args:
        as_json: also write {"error": ...} to stdout.
    """
    try:
        yield
        sys.stdout.flush()
    except (click.ClickException, click.exceptions.Exit):
        raise
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted.", err=True)
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        _abandon_stdout()
        raise click.exceptions.Exit(EXIT_BROKEN_PIPE) from None
    except OffloadError as error:
        # str() of an OSError starts with "[Errno 28]", which helps nobody.
        message = error.strerror if isinstance(error, StorageError) and error.strerror else str(error)
        _fail(error, message, error.exit_code, as_json=as_json)
    except OSError as error:
        message = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
        _fail(error, message, EXIT_STORAGE, as_json=as_json)
    except Exception as error:  # noqa: BLE001 - the outermost frame of a command
        _fail(error, f"{type(error).__name__}: {error}", EXIT_FAILED, as_json=as_json)


def _fail(error: Exception, message: str, exit_code: int, *, as_json: bool) -> None:
    if os.environ.get("OFFLOAD_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error, file=sys.stderr)
    click.echo(f"Error: {message}", err=True)
    if as_json:
        lacking = error if isinstance(error, DoesNotFitError) else DoesNotFitError("")
        report = {
            "type": type(error).__name__,
            "message": message,
            "exit_code": exit_code,
            "minimum_ram_bytes": lacking.minimum_ram_bytes or None,
            "minimum_disk_bytes": lacking.minimum_disk_bytes or None,
        }
        click.echo(json.dumps({"error": report}, indent=2))
    raise click.exceptions.Exit(exit_code)


def _abandon_stdout() -> None:
    """Let what is still buffered go nowhere, or the interpreter complains of the same pipe when it ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
