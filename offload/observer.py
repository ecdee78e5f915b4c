"""Everything that watches MoE steps: cache shares, prefetching, routers' scores, traces."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from offload.prefetcher import Prefetcher
from offload.recorder import TraceRecorder
from offload.scores import RouterScores


class StepObserver:
    """The runtime's `StepWatch`: knows the pass and the layer, passes on what it sees.

    Attributes:
        prefill: whether the pass that runs has several tokens of a sequence.
        prefetcher: reads ahead; None where nothing is read ahead.
        recorder: keeps the routing; None where nobody asked for a trace.
        scores: of routers, for policies; None where no policy wants them.
    """

    def __init__(self) -> None:
        self.prefill = False
        self.prefetcher: Prefetcher | None = None
        self.recorder: TraceRecorder | None = None
        self.scores: RouterScores | None = None
        self._layer = 0
        self._chosen: npt.NDArray[np.int64] | None = None
        self._learnt = False

    @property
    def is_asked(self) -> bool:
        """Whether anything becomes of what it is told."""
        return self.prefetcher is not None or self.recorder is not None or self.scores is not None

    def begin(self, layer: int) -> None:
        """A step of `layer` (counted over experts layers) starts."""
        self._layer = layer
        self._chosen, self._learnt = None, False

    def loads_started(self) -> None:
        """Reads that the step needs are on their way: now others may follow."""
        if self.prefetcher is not None and not self.prefill:
            self.prefetcher.read_ahead(self._layer)

    def chosen(self, top_k_index: npt.NDArray[np.int64]) -> None:
        """What the step's routing will have been, int64 [T, k], is known; it stays until the step is computed."""
        self._chosen = top_k_index

    def waiting(self) -> None:
        """The step can only wait for reads now: the time to learn."""
        if self._chosen is not None:
            self._learn(self._chosen)
            self._learnt = True

    def _learn(self, top_k_index: npt.NDArray[np.integer]) -> None:
        prefetcher = self.prefetcher
        if prefetcher is not None and prefetcher.on and len(top_k_index) == 1 and not self.prefill:
            prefetcher.observe(self._layer, np.ascontiguousarray(top_k_index[0], np.int64))

    def finished(self, top_k_index: npt.NDArray[np.integer]) -> None:
        """The step is computed; its routing was `top_k_index`, integer [T, k]."""
        if not self._learnt:
            self._learn(top_k_index)
        if self.recorder is not None:
            self.recorder.note(self._layer, top_k_index, prefill=self.prefill)
        if self.scores is not None:
            self.scores.tell(self._layer)

    def failed(self) -> None:
        """The step failed: what was foreseen is of no use."""
        if self.prefetcher is not None:
            self.prefetcher.forget_pass()
