"""The machine that is simulated: resources that do one thing after another, and what they did when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Span(NamedTuple):
    """What a resource did for some time."""

    resource: str
    name: str
    start_s: float
    seconds: float


@dataclass
class Resource:
    """Serves one at a time.

    Attributes:
        name: "cpu", "gpu", "link" or "disk".
        free_s: when it is free.
        busy_s: how long it worked since counting began.
    """

    name: str
    free_s: float = 0.0
    busy_s: float = 0.0


@dataclass
class Machine:
    """Resources on one clock.

    Attributes:
        cpu: computes; what is not overlapped with experts runs here too.
        gpu: the accelerator.
        link: copies experts to it.
        disk: reads; several reads are in flight, and it is busy while any is.
        spans: what is recorded; None while nothing is.
    """

    cpu: Resource = field(default_factory=lambda: Resource("cpu"))
    gpu: Resource = field(default_factory=lambda: Resource("gpu"))
    link: Resource = field(default_factory=lambda: Resource("link"))
    disk: Resource = field(default_factory=lambda: Resource("disk"))
    spans: list[Span] | None = None

    def work(
        self, resource: Resource, start_s: float, seconds: float, name: str, what: str = "", count: int = 0
    ) -> float:
        """Let a resource work from a moment on, or from when it is free; when it is done.

        Args:
            resource: of this machine.
            start_s: not before.
            seconds: of work.
            name: of the layer, for the timeline.
            what: it does.
            count: of experts, 0 where it is not of experts.
        """
        begin = start_s if start_s >= resource.free_s else resource.free_s
        resource.free_s = end = begin + seconds
        resource.busy_s += seconds
        if self.spans is not None and seconds > 0:
            parts = (name, what, str(count) if count else "")
            self.spans.append(Span(resource.name, " ".join(part for part in parts if part), begin, seconds))
        return end

    def resources(self) -> tuple[Resource, ...]:
        """All four."""
        return self.cpu, self.gpu, self.link, self.disk

    def count_from_zero(self) -> None:
        """Forget how long resources worked."""
        for resource in self.resources():
            resource.busy_s = 0.0


def chrome_trace(spans: list[Span], title: str) -> dict[str, Any]:
    """Spans as Chrome's JSON trace, which Perfetto (ui.perfetto.dev) and chrome://tracing show.

    Args:
        spans: in seconds.
        title: of the process.
    """
    threads = {name: number for number, name in enumerate(("cpu", "gpu", "link", "disk"), 1)}
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": title}}]
    events += [
        {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": name}}
        for name, number in threads.items()
    ]
    events += [
        {
            "ph": "X",
            "pid": 1,
            "tid": threads[span.resource],
            "name": span.name,
            "cat": span.resource,
            "ts": span.start_s * 1e6,
            "dur": span.seconds * 1e6,
        }
        for span in spans
    ]
    return {"displayTimeUnit": "ms", "traceEvents": events}
