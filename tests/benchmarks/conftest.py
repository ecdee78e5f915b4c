"""A model of a few hundred kB and child processes that are not: imports would take most of the time."""

from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory import TINY as TINY
from benchmarks.peers import Process
from benchmarks.worker import Worker


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("benchmarks")
    probe = directory / "probe"
    probe.touch()
    try:
        os.close(os.open(probe, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    return directory


@pytest.fixture
def local_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Process` calls a worker in this process; what crosses the pipe still goes through JSON."""

    def start(self: Any) -> None:
        self.worker, self.answers = Worker(), deque()

    def send(self: Any, call: str, **arguments: Any) -> None:
        self.answers.append(self.worker.answer(json.dumps({"call": call, "arguments": arguments})))

    def close(self: Any) -> None:
        self.worker.close()

    monkeypatch.setattr(Process, "__init__", start)
    monkeypatch.setattr(Process, "send", send)
    monkeypatch.setattr(Process, "_next_line", lambda self: self.answers.popleft())
    monkeypatch.setattr(Process, "close", close)
