"""The server of the doorbell: a thread that answers an accelerator's requests without Python, and without the GIL."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import doorbell_kernel as kernel
from cpu_kernels.tape import Choice, Tape
from cpu_kernels.threads import Pool, pause_us
from offload.devices.mailbox import Mailbox
from offload.errors import ClosedError, DoorbellError
from offload.moe.layer import ExpertsLayer

SPIN_US = 200.0
"""What an accelerator takes from one MoE layer to the next is about this."""

NAP_US = 20
"""Between two looks after that; the system makes it some 70."""

CLOSING_S = 10.0

Fetch = Callable[[int, list[int]], None]
"""(layer, experts): bring experts that are nowhere into host memory and write their addresses to `homes`."""


def why_not_served(layer: ExpertsLayer) -> str | None:
    """The reason why compiled code alone cannot compute a layer, None where it can."""
    if layer.activation is None:
        return f"{layer.name}: its gate is known to its own module only"
    return None


class DoorbellServer:
    """Computes the experts of requests in place, on a thread of its own and a pool's.

    One step at a time: `announce` its requests, start the stream's work, wait for the stream, `check`. Homes change
    between steps only, or within `fetch`.

    Attributes:
        box: the mailbox.
        homes: of each layer int64 [experts]: the address of an expert's bundle in host memory, ELSEWHERE for those that
            the accelerator computes, NOWHERE for those that have to be fetched first.
    """

    def __init__(
        self,
        box: Mailbox,
        layers: Sequence[ExpertsLayer],
        pool: Pool,
        fetch: Fetch,
        *,
        spin_us: float = SPIN_US,
        nap_us: int = NAP_US,
    ) -> None:
        """Write a tape for each layer; all experts are elsewhere. Nothing is answered before `start`.

        Args:
            box: its layout is that of every layer's requests.
            layers: those that `why_not_served` has nothing against.
            pool: joins in computing.
            fetch: called on the server's thread.
            spin_us: how long it looks for a request without a pause.
            nap_us: how long it sleeps between two looks after that.

        Raises:
            ValueError: a layer that cannot be served, or of another hidden size or dtype.
        """
        self.box = box
        self._layers = tuple(layers)
        self._fetch = fetch
        self._pool = pool
        self._error: BaseException | None = None
        self._closed = False
        self.homes = [np.zeros(layer.count, np.int64) for layer in layers]
        self._missing = np.zeros(box.layout.pairs, np.int64)
        self._tapes: list[Tape] = []
        self._table = np.array([self._layer_fields(*each) for each in zip(layers, self.homes, strict=True)], np.int64)
        self._words, self._address = self._server_words(pool, spin_us, nap_us)
        kernel.initialise(self._address)
        self._thread = threading.Thread(target=self._run, name="offload-doorbell", daemon=True)

    def start(self) -> None:
        """Answer requests from now on; call once."""
        self._thread.start()

    def _layer_fields(self, layer: ExpertsLayer, homes: npt.NDArray[np.int64]) -> list[int]:
        layout = self.box.layout
        reason = why_not_served(layer)
        if reason is not None or layer.activation is None:
            raise ValueError(reason)
        if layer.layout.hidden != layout.hidden or layer.dtype != layout.dtype:
            raise ValueError(f"{layer.name}: the mailbox is for {layout.dtype} [{layout.tokens}, {layout.hidden}]")
        tape = Tape(layer.dtype)
        ids, weights = tape.scratch(layout.pairs, torch.int64), tape.scratch(layout.pairs, torch.float32)
        shape = layout.tokens, layout.top_k
        choice = Choice(ids.view(shape), weights.view(shape), weights)
        sums = tape.experts(layer.layout, layer.activation, homes, choice, self.box.hidden.data_ptr())
        self._tapes.append(tape)
        words = tape.words
        return [
            layer.count, homes.ctypes.data, words.ctypes.data, len(words), ids.data_ptr(), weights.data_ptr(), sums,
        ]  # fmt: skip

    def _server_words(self, pool: Pool, spin_us: float, nap_us: int) -> tuple[npt.NDArray[np.int64], int]:
        storage = np.zeros(kernel.SERVER_WORDS + 16, np.int64)
        start = -storage.ctypes.data % 128 // 8
        words = storage[start : start + kernel.SERVER_WORDS]
        _, ids, weights, sums, _ = self.box.layout.offsets()
        launcher, state = pool.launcher
        values = {
            kernel.MAILBOX: self.box.address, kernel.LAYERS: len(self._layers),
            kernel.LAYER_TABLE: self._table.ctypes.data, kernel.PAIRS: self.box.layout.pairs,
            kernel.SUM_COUNT: self.box.sums.numel(), kernel.IDS: ids, kernel.WEIGHTS: weights, kernel.SUMS: sums,
            kernel.LAUNCHER: launcher, kernel.LAUNCHER_STATE: state, kernel.THREADS: pool.threads,
            kernel.SPINS: int(spin_us / pause_us()), kernel.NAP_US: nap_us, kernel.MISSING: self._missing.ctypes.data,
        }  # fmt: skip
        for field, value in values.items():
            words[field] = value
        return words, int(words.ctypes.data)

    def announce(self, requests: int) -> None:
        """So many requests are about to come: those of one step.

        Raises:
            ClosedError: after `close()`.
        """
        if self._closed:
            raise ClosedError("the doorbell's server was closed; load the model again")
        kernel.announce(self._address, requests)

    def check(self) -> None:
        """After the stream has done a step: whether every request of it was answered with sums.

        Raises:
            DoorbellError: a request was none, or the server was closed.
            Whatever `fetch` raised.
        """
        status, error = self.box.take_status(), self._error
        self._error = None
        # A step that ended early leaves requests that never come.
        kernel.announce(self._address, -kernel.expected(self._address))
        if error is not None:
            raise error
        if status != kernel.FINE:
            raise DoorbellError(
                "a decode step asked for a layer or an expert that there is not, or the server was closed under it; "
                "its outputs are not valid: run the step again, layer by layer"
            )

    def serve_turn(self) -> Iterator[str]:
        """One look at the bell, step by step: what `start`ed threads do, for whoever wants to be between the steps.

        Yields:
            What comes next: "compute", "answer"; nothing where no request is there.
        """
        layer = kernel.take(self._address)
        if layer == kernel.NOTHING:
            return
        yield "compute"
        found = kernel.compute(self._address, layer)
        yield "answer"
        if found > 0:
            self._answer_after_fetching(layer)
        else:
            kernel.answer(self._address, layer, kernel.BAD_REQUEST if found == kernel.BROKEN else kernel.FINE)

    def _run(self) -> None:
        while (layer := kernel.serve(self._address)) != kernel.STOPPED:
            self._answer_after_fetching(layer)
        deadline = time.monotonic() + CLOSING_S
        while kernel.expected(self._address) > 0 and time.monotonic() < deadline:
            # Nobody computes any more, but a stream that waits for ever could never be destroyed.
            if (layer := kernel.take(self._address)) != kernel.NOTHING:
                kernel.answer(self._address, layer, kernel.FAILED)
            else:
                time.sleep(NAP_US * 1e-6)

    def _answer_after_fetching(self, layer: int) -> None:
        status = kernel.FAILED
        try:
            while (count := kernel.compute(self._address, layer)) > 0:
                self._fetch(layer, sorted(set(self._missing[:count].tolist())))
                if (self.homes[layer][self._missing[:count]] == kernel.NOWHERE).any():
                    raise DoorbellError(f"{self._layers[layer].name}: experts were fetched and are nowhere")
            status = kernel.FINE if count == 0 else kernel.BAD_REQUEST
        except BaseException as error:  # noqa: BLE001 - carried to whoever checks the step
            self._error = error
        kernel.answer(self._address, layer, status)

    def close(self) -> None:
        """End the thread; requests that were announced are answered without sums. May be called again."""
        if not self._closed:
            self._closed = True
            kernel.stop(self._address)
            if self._thread.ident is not None:
                self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
