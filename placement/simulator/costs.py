"""Seconds that the simulator gives to a layer's experts, from the same curves as predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from placement.disk import FloatArray
from placement.expert_cost import cpu_arrival_s, expert_entries, expert_weights, grouping_s
from placement.hardware_profile import HardwareProfile
from placement.homes import Homes
from placement.model_spec import ExpertsSpec
from placement.outputs import groups_of
from prefetch.scheduler.records import LayerCosts
from prefetch.scheduler.scheduler import LayerScheduler

_SCHEDULERS_KEPT = 64


@dataclass(frozen=True)
class _Reads:
    """How reads of experts go: seconds until the n-th of m is there.

    Attributes:
        startup_s: what m reads take more, by m, than reads that go on.
        one_s: of one of b bundles that are in flight together, by b - 1, the disk's time shared out.
    """

    startup_s: Callable[[int], float]
    one_s: tuple[float, ...]

    def arrivals(self, count: int) -> list[float]:
        """Seconds until each of `count` is there, ascending; as many as can be are in flight and end together."""
        together = min(count, len(self.one_s))
        one, startup_s = self.one_s[together - 1], self.startup_s(count)
        return [startup_s + max(number, together) * one for number in range(1, count + 1)]


class ExpertCosts:
    """One kind of MoE layers on a machine."""

    def __init__(self, experts: ExpertsSpec, profile: HardwareProfile, homes: Homes) -> None:
        self._experts = experts
        self._weights, self._entries = expert_weights(experts), expert_entries(experts)
        self._profile = profile
        self._homes = homes
        self._layout = experts.layout
        self._cpu = profile.cpu.expert(experts.layout.format)
        self._gpu = None if profile.gpu is None else profile.gpu.expert(experts.layout.format)
        self._seconds: dict[tuple[bool, int], float] = {}
        self._schedulers: dict[int, LayerScheduler] = {}
        self.cpu_call_s = self._cpu.call_s
        self.step_arrival_s = cpu_arrival_s(experts, profile, decode=True)
        self.arrival_s = cpu_arrival_s(experts, profile, decode=False)
        self.gpu_call_s = 0.0 if self._gpu is None else self._gpu.call_s
        self.copy_s = 0.0 if profile.to_gpu is None else profile.to_gpu.seconds(experts.layout.nbytes)

    def seconds(self, tokens: int, *, on_gpu: bool = False) -> float:
        """Of one expert with so many tokens, without the call."""
        key = on_gpu, tokens
        if key not in self._seconds:
            curve = self._gpu if on_gpu else self._cpu
            assert curve is not None, "an expert on an accelerator that is not there"
            self._seconds[key] = curve.without_call_s(self._weights, tokens, self._entries)
        return self._seconds[key]

    def groups_of(self, outputs: int) -> int:
        """See `placement.outputs.groups_of`."""
        return groups_of(outputs, accelerated=self._profile.gpu is not None)

    def grouping_s(self, outputs: int) -> float:
        """See `placement.expert_cost.grouping_s`."""
        return grouping_s(self._experts, self._profile, outputs)

    def crossing_s(self, rows: int) -> float:
        """Activations of a pass to the accelerator and back."""
        if self._profile.to_gpu is None or self._profile.from_gpu is None:
            return 0.0
        nbytes = rows * self._layout.hidden * 2
        return self._profile.to_gpu.seconds(nbytes) + self._profile.from_gpu.seconds(nbytes)

    @cached_property
    def reads(self) -> _Reads:
        """How this layer's experts are read.

        Raises:
            ValueError: the profile has no disk.
        """
        disk, homes, nbytes = self._profile.disk, self._homes, self._layout.nbytes
        if disk is None:
            raise ValueError(f"{self._profile.name} has no disk, and an expert has to be read")
        block = min(nbytes, homes.read_chunk_nbytes)
        pieces = math.ceil(nbytes / homes.read_chunk_nbytes)
        most = max(1, math.ceil(homes.reader_threads / pieces))
        one = [
            nbytes / disk.overlapped_bytes_per_s(block, min(homes.reader_threads, bundles * pieces))
            for bundles in range(1, most + 1)
        ]

        def going_on_s(counts: FloatArray) -> FloatArray:
            seconds: FloatArray = counts * np.array(one)[np.minimum(counts.astype(int), most) - 1]
            return seconds

        @cache
        def startup_s(count: int) -> float:
            return float(disk.startup_s(nbytes, np.array(float(count)), going_on_s))

        return _Reads(startup_s, tuple(one))

    def scheduler(self, loads: Sequence[int]) -> LayerScheduler:
        """The runtime's scheduler, told what experts of these loads take here: straight from one token to the most."""
        most = max(loads)
        if most not in self._schedulers:
            if len(self._schedulers) >= _SCHEDULERS_KEPT:
                self._schedulers.clear()
            cpu_token, cpu_expert = self._line(most, on_gpu=False)
            gpu_token, gpu_expert = self._line(most, on_gpu=True)
            one_s = self.reads.one_s[-1] if self._profile.disk is not None else 0.0
            costs = LayerCosts(
                cpu_token_s=cpu_token, cpu_expert_s=cpu_expert, cpu_first_s=self.cpu_call_s, gpu_expert_s=gpu_expert,
                gpu_token_s=gpu_token, gpu_before_s=self.gpu_call_s, link_expert_s=self.copy_s, disk_expert_s=one_s,
            )  # fmt: skip
            self._schedulers[most] = LayerScheduler(costs)
        return self._schedulers[most]

    def _line(self, most: int, *, on_gpu: bool) -> tuple[float, float]:
        """(seconds of a token, seconds of an expert) of the line through one token and the most."""
        one = self.seconds(1, on_gpu=on_gpu)
        slope = (self.seconds(most, on_gpu=on_gpu) - one) / (most - 1) if most > 1 else 0.0
        return slope, max(0.0, one - slope)
