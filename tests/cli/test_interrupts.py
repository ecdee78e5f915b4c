"""An interrupt that Python dropped is found."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from offload.cli.interrupts import noted_interrupts


class Dropping:
    """Is interrupted in its finaliser."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """As in a process of its own, whatever runs the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_was_dropped_is_raised_later(capfd: pytest.CaptureFixture[str]) -> None:
    hook = sys.unraisablehook
    with noted_interrupts() as check:
        check()
        made = Dropping()
        del made
        with pytest.raises(KeyboardInterrupt):
            check()
    assert capfd.readouterr().err == ""
    assert sys.unraisablehook is hook
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_others_that_are_dropped_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(dropped.exc_type))

    class Failing:
        def __del__(self) -> None:
            raise ValueError

    with noted_interrupts(), suppress(KeyboardInterrupt):
        made = Failing()
        del made
        signal.raise_signal(signal.SIGINT)
    assert told == [ValueError]


def test_signals_of_others_are_left_alone() -> None:
    def other(*_: object) -> None:
        raise AssertionError

    signal.signal(signal.SIGINT, other)
    with noted_interrupts() as check:
        assert signal.getsignal(signal.SIGINT) is other
        check()
    found: list[object] = []

    def elsewhere() -> None:
        with noted_interrupts():
            found.append(signal.getsignal(signal.SIGINT))

    signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
