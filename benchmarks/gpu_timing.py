"""How calls are timed on a GPU; in the interpreter they run too, and their times mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

from benchmarks.harness import Spread


def accelerator() -> str:
    """Torch's current CUDA device, "cuda:N"; "host" where there is none: host memory plays one."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "host"


def seconds_of(call: Callable[[int], object], device: torch.device, rounds: int) -> Spread:
    """Seconds of call(round), each round alone, after two that are not counted; on a GPU by its own clock."""
    times = []
    for index in range(rounds + 2):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call(index)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            before = perf_counter()
            call(index)
            times.append(perf_counter() - before)
    return Spread.of(times[2:])


def replayed(call: Callable[[int], object], device: torch.device, turns: int) -> Callable[[int], object]:
    """The calls 0 to turns - 1 as one CUDA graph: starting kernels from Python costs more than few tokens take."""
    if device.type != "cuda":
        return lambda _index: [call(turn) for turn in range(turns)]
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for turn in range(turns):
            call(turn)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its stream current.
    with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph, stream=stream):
        for turn in range(turns):
            call(turn)
    return lambda _index: graph.replay()
