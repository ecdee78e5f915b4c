"""Recording the routing of a run; see docs/traces.md."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prefetch.policies.geometry import Geometry
from prefetch.traces.trace import RoutingTrace


class TraceRecorder:
    """Collects whole passes; one that did not go through all layers in order is left out."""

    def __init__(self, name: str, geometry: Geometry) -> None:
        self.name = name
        self.geometry = geometry
        self.left_out = 0
        self._passes: list[tuple[bool, npt.NDArray[np.uint16]]] = []
        self._current: list[npt.NDArray[np.uint16]] = []

    def note(self, layer: int, top_k_index: npt.NDArray[np.integer], *, prefill: bool) -> None:
        """A layer's routing.

        Args:
            layer: counted over experts layers.
            top_k_index: integer [T, k].
            prefill: whether the pass has several tokens of a sequence.
        """
        if layer != len(self._current) or (layer and top_k_index.shape != self._current[0].shape):
            self.left_out += bool(self._current)
            self._current = []
            if layer:
                return
        if top_k_index.size and top_k_index.max() >= self.geometry.counts[layer]:
            # Pairs that no expert computes: such a pass is none of a trace's.
            self._current = []
            self.left_out += 1
            return
        self._current.append(top_k_index.astype(np.uint16))
        if len(self._current) == self.geometry.layers:
            self._passes.append((prefill, np.stack(self._current, axis=1)))
            self._current = []

    def trace(self) -> RoutingTrace:
        """What was recorded so far."""
        top_k = self._passes[0][1].shape[-1] if self._passes else 1
        whole = [(prefill, experts) for prefill, experts in self._passes if experts.shape[-1] == top_k and len(experts)]
        return RoutingTrace(
            self.name,
            self.geometry,
            top_k,
            np.array([len(experts) for _, experts in whole], np.int32),
            np.array([prefill for prefill, _ in whole], np.bool_),
            np.concatenate([experts for _, experts in whole])
            if whole
            else np.empty((0, self.geometry.layers, top_k), np.uint16),
        )
