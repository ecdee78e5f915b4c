"""One MoE layer, event by event: what is there computes, what is missing is read, copied and computed as it comes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from placement.simulator.machine import Machine

_READ_FOR_CPU, _READ_FOR_GPU, _COPIED, _GPU_TAKES, _CPU_TAKES = range(5)
"""Kinds of events; of those at the same moment what arrives comes before who takes it."""


@dataclass
class LayerWork:
    """What one layer of one pass has to do with its experts, in seconds of each.

    Attributes:
        resident_cpu_s: of experts in RAM that the CPU computes in place.
        in_vram_s: of experts in VRAM, on the accelerator.
        copied_s: of experts in RAM that are copied first, on the accelerator.
        reads: of experts on disk, in the order of reading: (seconds until it is there, seconds of computing it, whether
            it is copied to the accelerator first).
        cpu_call_s: of each call of the CPU's kernel.
        arrival_s: of the CPU for each expert that arrives, in the place of a call.
        gpu_call_s: of each call of the accelerator's.
        copy_s: of copying an expert.
        crossing_s: of activations to the accelerator and back, where it computes anything.
        disk_s: in which the disk is busy.
    """

    resident_cpu_s: Sequence[float] = ()
    in_vram_s: Sequence[float] = ()
    copied_s: Sequence[float] = ()
    reads: list[tuple[float, float, bool]] = field(default_factory=list)
    cpu_call_s: float = 0.0
    arrival_s: float = 0.0
    gpu_call_s: float = 0.0
    copy_s: float = 0.0
    crossing_s: float = 0.0
    disk_s: float = 0.0


def play(machine: Machine, start_s: float, work: LayerWork, name: str) -> float:
    """Run the experts of a layer; when the last is done.

    Args:
        machine: every resource is free at the start.
        start_s: when the layer was routed.
        work: what is to be done.
        name: of the layer, for the timeline.
    """
    events: list[tuple[float, int, float]] = []
    cpu, gpu, link = machine.cpu, machine.gpu, machine.link
    if work.reads:
        machine.work(machine.disk, start_s, work.disk_s, name, "read", len(work.reads))
        events = [(start_s + after, _READ_FOR_GPU if gpu_ else _READ_FOR_CPU, s) for after, s, gpu_ in work.reads]
        heapq.heapify(events)
    if work.resident_cpu_s:
        seconds = work.cpu_call_s + sum(work.resident_cpu_s)
        machine.work(cpu, start_s, seconds, name, "resident", len(work.resident_cpu_s))
    if work.in_vram_s or work.copied_s or any(on_gpu for _, _, on_gpu in work.reads):
        machine.work(link, start_s, work.crossing_s, name, "activations")
    if work.in_vram_s:
        seconds = work.gpu_call_s + sum(work.in_vram_s)
        machine.work(gpu, start_s, seconds, name, "resident", len(work.in_vram_s))
    for seconds in work.copied_s:
        heapq.heappush(events, (machine.work(link, start_s, work.copy_s, name, "copy", 1), _COPIED, seconds))
    _drain(machine, events, work, name)
    return max(start_s, cpu.free_s, gpu.free_s, link.free_s)


def _drain(machine: Machine, events: list[tuple[float, int, float]], work: LayerWork, name: str) -> None:
    """Until nothing more happens. Who is free takes all that has arrived, in one call."""
    waiting_cpu: list[float] = []
    waiting_gpu: list[float] = []
    push = heapq.heappush
    while events:
        now, kind, seconds = heapq.heappop(events)
        if kind == _READ_FOR_CPU:
            if not waiting_cpu:
                push(events, (max(now, machine.cpu.free_s), _CPU_TAKES, 0.0))
            waiting_cpu.append(seconds)
        elif kind == _READ_FOR_GPU:
            push(events, (machine.work(machine.link, now, work.copy_s, name, "copy", 1), _COPIED, seconds))
        elif kind == _COPIED:
            if not waiting_gpu:
                push(events, (max(now, machine.gpu.free_s), _GPU_TAKES, 0.0))
            waiting_gpu.append(seconds)
        elif kind == _GPU_TAKES:
            machine.work(machine.gpu, now, work.gpu_call_s + sum(waiting_gpu), name, "copied", len(waiting_gpu))
            waiting_gpu.clear()
        else:
            seconds = len(waiting_cpu) * work.arrival_s + sum(waiting_cpu)
            machine.work(machine.cpu, now, seconds, name, "arrived", len(waiting_cpu))
            waiting_cpu.clear()


def play_in_order(
    machine: Machine, start_s: float, experts: Sequence[tuple[float, float, bool]], work: LayerWork, name: str
) -> float:
    """As `play` where sums of many pairs have a fixed order: one expert after the other, those ahead load meanwhile.

    Args:
        machine: as in `play`.
        start_s: as in `play`.
        experts: in order, (seconds until it is there, seconds of computing it, whether on the accelerator).
        work: calls, crossings and the disk count of it.
        name: of the layer.
    """
    if any(after > 0 for after, _, _ in experts):
        machine.work(machine.disk, start_s, work.disk_s, name, "read", sum(after > 0 for after, _, _ in experts))
    now = start_s
    for after, seconds, on_gpu in experts:
        ready = max(now, start_s + after)
        if on_gpu:
            now = machine.work(machine.gpu, ready, work.gpu_call_s + seconds, name, "in order", 1)
        else:
            call_s = work.arrival_s if after > 0 else work.cpu_call_s
            now = machine.work(machine.cpu, ready, call_s + seconds, name, "in order", 1)
    return max(now, machine.work(machine.link, start_s, work.crossing_s, name, "activations"))
