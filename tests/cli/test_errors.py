from __future__ import annotations

import errno
import inspect
import json

import pytest

from offload import errors
from offload.cli import run
from tests.cli.conftest import Invoke

CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, errors.OffloadError)]
EXIT_CODES = {
    "InvalidArgumentError": 2,
    "DoesNotFitError": 3,
    "CheckpointError": 4,
    "CheckpointNotFoundError": 4,
    "CheckpointChangedError": 4,
    "UnsupportedModelError": 4,
    "TraceFileError": 4,
    "StoreError": 4,
    "StoreCorruptError": 4,
    "StoreBusyError": 5,
    "StorageError": 5,
    "HubUnreachableError": 5,
}


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_arguments: object) -> None:
        raise error

    monkeypatch.setattr(run, "_run", fail)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_is_one_message_and_its_exit_code(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, kind: type[errors.OffloadError]
) -> None:
    error = kind(errno.EIO, "what went wrong") if kind is errors.StorageError else kind("what went wrong")
    fail_with(monkeypatch, error)
    result = invoke("run", "model", "-p", "x", "--json")
    assert result.exit_code == EXIT_CODES.get(kind.__name__, 1)
    assert result.stderr == "Error: what went wrong\n"
    report = json.loads(result.stdout)["error"]
    assert list(report) == ["type", "message", "exit_code", "minimum_ram_bytes", "minimum_disk_bytes"]
    assert (report["type"], report["message"], report["exit_code"]) == (
        kind.__name__,
        "what went wrong",
        result.exit_code,
    )
    assert invoke("run", "model", "-p", "x").stdout == ""


def test_what_would_fit_is_reported(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, errors.DoesNotFitError("too big", minimum_ram_bytes=5))
    report = json.loads(invoke("run", "model", "-p", "x", "--json").stdout)["error"]
    assert (report["minimum_ram_bytes"], report["minimum_disk_bytes"]) == (5, None)


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (ZeroDivisionError("division by zero"), 1, "Error: ZeroDivisionError: division by zero\n"),
        (OSError(errno.EIO, "broken"), 5, "Error: [Errno 5] broken\n"),
        (OSError(errno.ENOENT, "not there", "/some/where"), 5, "Error: /some/where: not there\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_other_exceptions(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, error: BaseException, exit_code: int, message: str
) -> None:
    fail_with(monkeypatch, error)
    result = invoke("run", "model", "-p", "x")
    assert (result.exit_code, result.stderr) == (exit_code, message)


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_debug_shows_the_traceback(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, value: str, shown: bool) -> None:
    monkeypatch.setenv("OFFLOAD_DEBUG", value)
    fail_with(monkeypatch, errors.StoreError("damaged"))
    result = invoke("run", "model", "-p", "x")
    assert ("Traceback" in result.stderr) is shown
    assert result.stderr.endswith("Error: damaged\n")
    assert result.exit_code == 4


def test_a_model_that_is_not_there(invoke: Invoke) -> None:
    for command in (["plan", "/nonexistent/model"], ["run", "/nonexistent/model", "-p", "x"]):
        result = invoke(*command)
        assert result.exit_code == 4
        assert "/nonexistent/model" in result.stderr
        assert "Traceback" not in result.stderr
