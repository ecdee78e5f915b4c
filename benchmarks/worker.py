"""The child process of a benchmark: `python -m benchmarks.worker` answers JSON lines until its input ends.

A request is {"call": name, "arguments": {...}}, an answer {"result": ...} or {"error": traceback}. Answers go to the
descriptor that was stdout at the start; whatever else is printed goes to stderr.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from benchmarks.sessions import Decoded, Fed, ModelOptions, Session


class Worker:
    """The calls that a parent can make."""

    def __init__(self) -> None:
        self._session: Session | None = None

    def open(self, **options: Any) -> Any:
        """Load a model; see `ModelOptions`."""
        self._session = Session(ModelOptions(**options))
        return self._session.describe()

    def session(self, method: str, **arguments: Any) -> Any:
        """Call a method of the open session."""
        return getattr(self._session, method)(**arguments)

    def load_stages(self, **arguments: Any) -> Any:
        """See `benchmarks.load.load_stages`."""
        from benchmarks.load import load_stages

        return load_stages(**arguments)

    def peak_memory(self, **arguments: Any) -> Any:
        """See `benchmarks.memory.peak_memory`."""
        from benchmarks.memory import peak_memory

        return peak_memory(**arguments)

    def first_load(self, **arguments: Any) -> Any:
        """See `benchmarks.compiling.first_load`."""
        from benchmarks.compiling import first_load

        return first_load(**arguments)

    def close(self) -> None:
        """Close the open session."""
        if self._session is not None:
            self._session.close()

    def answer(self, request: str) -> str:
        """The answer to a request, both JSON."""
        asked = json.loads(request)
        call: Callable[..., Any] = getattr(self, asked["call"])
        try:
            result = call(**asked["arguments"])
        except Exception:  # noqa: BLE001 - it is the parent's to raise
            return json.dumps({"error": traceback.format_exc()})
        return json.dumps({"result": dataclasses.asdict(result) if isinstance(result, (Decoded, Fed)) else result})


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests, line by line, until they end."""
    worker = Worker()
    for line in requests:
        answers.write(worker.answer(line) + "\n")
        answers.flush()
    worker.close()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as real_stdout:
        os.dup2(2, 1)
        serve(sys.stdin, real_stdout)
