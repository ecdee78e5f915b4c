"""What asking the CPU takes of a captured step, by either way of ringing; nothing is below, so nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

from benchmarks.harness import Report, Row, Spread
from cpu_kernels.threads import ThreadPool
from formats.bundle import BundleLayout
from offload.devices.doorbell import DoorbellServer
from offload.devices.mailbox import Mailbox, MailboxLayout, collect, mailbox_memory, ring
from offload.errors import CaptureError, DeviceError
from offload.measuring.kernels import Gate
from offload.moe.layer import ExpertsLayer
from offload.step_graph.graph import StepGraph
from offload.step_graph.recorded_graph import RecordedGraph

REQUESTS = 48
"""Of a step: layers of Qwen3-30B-A3B, whose width and experts of a token these are too."""

_HIDDEN, _INTERMEDIATE, _TOP_K = 2048, 64, 8


def doorbell_table(report: Report, device: torch.device, rounds: int) -> list[Row]:
    """Microseconds of a request and its answer in a graph that is replayed, each way.

    Args:
        report: takes gates; and a note for a way that the driver refuses.
        device: a GPU, or the CPU, where a recorded graph has a way of its own.
        rounds: replays.
    """
    rows: list[Row] = []
    for way, graph in _ways(device).items():
        try:
            rows.append({"way": way, **_timed(report, way, graph(), device, rounds)})
        except (CaptureError, DeviceError) as error:
            report.notes.append(f"the doorbell by {way}: {error}")
    return rows


def _ways(device: torch.device) -> dict[str, Callable[[], StepGraph]]:
    if device.type != "cuda":
        return {"recorded": RecordedGraph}
    from offload.devices.cuda_graph import CudaGraph

    return {
        "stream values": lambda: CudaGraph(device, functions=False),
        "host functions": lambda: CudaGraph(device, functions=True),
    }


def _timed(report: Report, way: str, graph: StepGraph, device: torch.device, rounds: int) -> Row:
    layout = MailboxLayout(1, _TOP_K, _HIDDEN, torch.bfloat16)
    box = Mailbox(layout, mailbox_memory(layout, device))
    bundle = BundleLayout(_HIDDEN, _INTERMEDIATE, "bf16")
    layers = [
        ExpertsLayer(f"layer {number}", _TOP_K * number, _TOP_K, bundle, torch.bfloat16, Gate(), "silu")
        for number in range(REQUESTS)
    ]
    hidden = torch.ones(1, _HIDDEN, dtype=torch.bfloat16, device=device)
    ids = torch.arange(_TOP_K, device=device)[None]
    weights = torch.ones(1, _TOP_K, device=device)
    sums = torch.empty(REQUESTS, 1, _HIDDEN, device=device)

    def step() -> None:
        for number in range(REQUESTS):
            ring(graph, box, number, hidden, ids, weights)
            collect(graph, box, number, sums[number])

    def bring(_layer: int, _experts: list[int]) -> None:
        raise AssertionError("no expert is asked of the CPU")

    microseconds, right = [], True
    # One thread: there is nothing to share.
    with ThreadPool(1) as pool, DoorbellServer(box, layers, pool, bring) as server:
        # What host memory records it does as well.
        server.announce(REQUESTS)
        graph.capture(step)
        server.check()
        for _ in range(rounds + 2):
            sums.fill_(torch.nan)
            server.announce(REQUESTS)
            before = perf_counter()
            graph.replay()
            microseconds.append((perf_counter() - before) / REQUESTS * 1e6)
            server.check()
            right = right and not sums.any()
    report.gate(f"doorbell by {way}", right, f"{REQUESTS} answers of {rounds + 2} replays are there, and are nothing")
    return {"requests": REQUESTS, "us_per_request": Spread.of(microseconds[2:])}
