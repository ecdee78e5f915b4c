"""Trace files, and what they say of a model's routing."""

from __future__ import annotations

from pathlib import Path

from offload.errors import InvalidArgumentError, TraceFileError
from offload.store.files import storage_errors
from offload.written_files import write_whole
from placement.model_spec import ModelSpec
from placement.predict import Routing
from placement.trace_routing import routing_of
from prefetch.traces import codec
from prefetch.traces.trace import RoutingTrace, TraceError


def read_trace(file: Path) -> RoutingTrace:
    """The trace in a file.

    Raises:
        TraceFileError: the file is no trace, or damaged.
        StorageError: it cannot be read.
    """
    with storage_errors("reading", file):
        data = file.read_bytes()
    try:
        return codec.decode(data)
    except TraceError as error:
        raise TraceFileError(f"{file}: {error}") from error


def write_trace(file: Path, trace: RoutingTrace) -> int:
    """Write a trace, in the place of what was there; its bytes.

    Raises:
        StorageError: the file cannot be written.
    """
    data = codec.encode(trace)
    write_whole(file, data)
    return len(data)


def read_routing(spec: ModelSpec, skew: float | None, file: Path | None) -> Routing | None:
    """What a user knows of a model's routing: a stated skew, or a trace; None where it is neither.

    Raises:
        InvalidArgumentError: both, the trace is another model's or too short, or the model is dense.
        TraceFileError, StorageError: see `read_trace`.
    """
    if not spec.experts and (skew is not None or file is not None):
        raise InvalidArgumentError(f"--skew and --trace: {spec.name} is a dense model, which routes nothing")
    if file is None:
        return None if skew is None else Routing.stated(skew)
    if skew is not None:
        raise InvalidArgumentError("--skew and --trace both say how popular experts are: give one of them")
    trace = read_trace(file)
    try:
        return routing_of(trace, spec)
    except TraceError as error:
        raise InvalidArgumentError(f"{file}: {error}") from error
