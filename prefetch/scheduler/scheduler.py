"""One layer's schedule: minimise when its last expert is done."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpu_kernels.compiling.compiler import direct
from prefetch.packing import int64s
from prefetch.scheduler import mapping_kernel as kernel
from prefetch.scheduler.records import Home, Ints, LayerCosts, Schedule, Unit
from prefetch.scheduler.timeline_kernel import ORDERS

_COUNTS = int64s(ORDERS)


class LayerScheduler:
    """Schedules layers of equal costs; holds the costs in the form that kernels take.

    Stateless otherwise: safe to use from several threads.
    """

    def __init__(self, costs: LayerCosts) -> None:
        self.costs = costs
        self._costs = costs.as_array()
        self._choose = direct(kernel.choose)

    def schedule(self, loads: Sequence[int] | Ints, homes: Sequence[int] | Ints) -> Schedule:
        """The best mapping that is found; see `mapping_kernel`.

        Args:
            loads: tokens of each active expert, 1 or more.
            homes: `Home` of each; none is on a GPU that is not there.

        Raises:
            ValueError: loads and homes do not go together, or the costs know no GPU and an expert is on one.
        """
        return self._run(kernel.BEST, None, loads, homes)

    def execute(
        self, units: Sequence[int] | Ints, loads: Sequence[int] | Ints, homes: Sequence[int] | Ints
    ) -> Schedule:
        """The timeline of a mapping that is given: `Unit` of each expert."""
        return self._run(kernel.GIVEN, units, loads, homes)

    def earliest_completion(self, loads: Sequence[int] | Ints, homes: Sequence[int] | Ints) -> Schedule:
        """HybriMoE's greedy as published, without what `schedule` tries beside it."""
        return self._run(kernel.GREEDY, None, loads, homes)

    def _run(
        self,
        what: int,
        units: Sequence[int] | Ints | None,
        loads: Sequence[int] | Ints,
        homes: Sequence[int] | Ints,
    ) -> Schedule:
        tokens, where = np.ascontiguousarray(loads, np.int64), np.ascontiguousarray(homes, np.int64)
        count = len(tokens)
        given = count if units is None else len(units)
        if len(where) != count or given != count:
            raise ValueError(f"{count} loads, {len(where)} homes, {given} units: expected one for each expert")
        orders, times = np.empty((kernel.ROWS, max(count, ORDERS)), np.int64), np.empty((2, count))
        if units is not None:
            orders[kernel.UNITS, :count] = units
        cpu_s, gpu_s = self._choose(what, tokens, where, self._costs, orders, times)
        if cpu_s != cpu_s:
            raise ValueError("an expert is on the GPU, but the costs know no GPU")
        on_cpu, on_gpu, copied, read = _COUNTS.unpack_from(orders.data, kernel.COUNTS * orders.strides[0])
        return Schedule(
            orders[0, :on_cpu], orders[1, :on_gpu], orders[2, :copied], orders[3, :read], times[1], cpu_s, gpu_s
        )


def all_on_cpu(homes: Ints) -> Ints:
    """The static mapping that computes every miss on the CPU."""
    return np.where(homes <= Home.BOTH, Unit.GPU, Unit.CPU).astype(np.int64)


def all_transferred(homes: Ints) -> Ints:
    """The static mapping that copies every miss to the GPU."""
    return np.full(len(homes), Unit.GPU, np.int64)
