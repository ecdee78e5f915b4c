"""The parent's side of child processes: each peer has a process of its own, which ends when its input does."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from benchmarks.machine import REPOSITORY
from benchmarks.sessions import Decoded, Fed, ModelOptions

_EXIT_SECONDS = 30


class PeerError(Exception):
    """A child process failed; the message has its traceback."""


class Process:
    """A worker process; see `benchmarks.worker`. A context manager: at its end the process is gone."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """Start it, with variables added to this process's environment."""
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=REPOSITORY,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, call: str, **arguments: Any) -> None:
        """Make a call without waiting for its answer."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"call": call, "arguments": arguments}) + "\n")
        self._child.stdin.flush()

    def receive(self) -> Any:
        """The answer to the oldest call that has none.

        Raises:
            PeerError: the call raised, or the process died.
        """
        line = self._next_line()
        if not line:
            raise PeerError(f"the process of a peer ended with exit code {self._child.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["result"]

    def _next_line(self) -> str:
        assert self._child.stdout is not None
        return "" if self._child.stdout.closed else self._child.stdout.readline()

    def call(self, call: str, **arguments: Any) -> Any:
        """Make a call and wait for its answer."""
        self.send(call, **arguments)
        return self.receive()

    def close(self) -> None:
        """End the process."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        try:
            self._child.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Peer(Process):
    """A process with one model; the methods of `Session` over the pipe."""

    def __init__(self, options: ModelOptions) -> None:
        """Begin to load; `ready` waits for it, so that several can load at once."""
        super().__init__()
        self.kind = options.kind
        self.send("open", **dataclasses.asdict(options))

    def ready(self) -> dict[str, Any]:
        """Wait until the model is loaded; what lies where. Call once."""
        description: dict[str, Any] = self.receive()
        return description

    def use_experts(self, implementation: str) -> None:
        """See `Session.use_experts`."""
        self.call("session", method="use_experts", implementation=implementation)

    def logits(self, prompt: list[int], file: str) -> None:
        """See `Session.logits`."""
        self.call("session", method="logits", prompt=prompt, file=file)

    def start(self, prompt: list[int]) -> float:
        """See `Session.start`."""
        return float(self.call("session", method="start", prompt=prompt))

    def prefill(self, prompt: list[int]) -> Fed:
        """See `Session.prefill`."""
        return Fed(**self.call("session", method="prefill", prompt=prompt))

    def memory(self) -> dict[str, int]:
        """See `Session.memory`."""
        found: dict[str, int] = self.call("session", method="memory")
        return found

    def decode(self, count: int) -> Decoded:
        """See `Session.decode`."""
        return Decoded(**self.call("session", method="decode", count=count))

    def feed(self, tokens: list[int]) -> Fed:
        """See `Session.feed`."""
        return Fed(**self.call("session", method="feed", tokens=tokens))
