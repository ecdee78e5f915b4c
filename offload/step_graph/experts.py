"""Experts of a captured step: asked for by the doorbell below, computed above meanwhile, and summed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from offload.devices.base import ExpertSums
from offload.devices.doorbell import DoorbellServer, why_not_served
from offload.devices.host_threads import kernel_pool
from offload.devices.mailbox import Mailbox, MailboxLayout, collect, ring
from offload.errors import CaptureError
from offload.moe.layer import ExpertsLayer
from offload.moe.tiered_step import Accelerated
from offload.step_graph.graph import StepGraph
from offload.step_graph.homes import Homes
from offload.step_graph.promotion import Promotion


def why_not_captured(layers: Sequence[ExpertsLayer], top_k: Sequence[int]) -> str | None:
    """The reason why experts layers cannot be part of a captured step, None where they can."""
    for layer in layers:
        if (reason := why_not_served(layer)) is not None:
            return reason
    if len({(layer.layout.hidden, layer.dtype) for layer in layers}) > 1 or len(set(top_k)) > 1:
        return "its experts layers differ in width, dtype or experts of a token"
    return None


class _Routed(NamedTuple):
    """What a step was routed to, and where that was.

    Attributes:
        keys: int64 [layers x T x k], layer by layer.
        above: bool, likewise: whether each was on the accelerator.
        fetched: how many the step had to wait for.
    """

    keys: npt.NDArray[np.int64]
    above: npt.NDArray[np.bool_]
    fetched: int


class GraphExperts:
    """The experts layers of a model in steps of one number of tokens.

    Attributes:
        tokens: T, of a step.
        homes: where experts are.
    """

    def __init__(
        self, accelerated: Accelerated, layers: Sequence[ExpertsLayer], top_k: int, tokens: int, device: torch.device
    ) -> None:
        """Start the doorbell's server.

        Args:
            accelerated: tiers and devices.
            layers: those that `why_not_captured` has nothing against.
            top_k: k.
            tokens: see above.
            device: of the model's tensors.
        """
        self.tokens = tokens
        self._accelerated, self._layers = accelerated, tuple(layers)
        self._number = {layer.first_key: number for number, layer in enumerate(layers)}
        self._first_keys = np.array([layer.first_key for layer in layers])
        # The server's thread fetches, and asks policies for victims, while they are told of the step before.
        self._tiers_lock = threading.Lock()
        self._uncounted: _Routed | None = None
        self._candidates: list[int] = []
        layout = MailboxLayout(tokens, top_k, layers[0].layout.hidden, layers[0].dtype)
        routed_nbytes = 8 * len(layers) * layout.pairs
        # On pages of their own: pinned, and mapped where the accelerator is a GPU.
        self._memory = accelerated.accelerator.host().allocate(layout.nbytes + routed_nbytes)
        memory = self._memory.bytes()
        self._box = Mailbox(layout, memory[: layout.nbytes])
        routed = torch.from_numpy(memory[layout.nbytes :][:routed_nbytes]).view(torch.int64)
        self._routed = routed.view(len(layers), tokens, top_k)
        fetch = weakref.WeakMethod(self._fetch)

        def fetch_if_alive(layer: int, missing: list[int]) -> None:
            # The server's thread must not keep alive what ends it.
            if (method := fetch()) is not None:
                method(layer, missing)

        self._server = DoorbellServer(self._box, layers, kernel_pool(), fetch_if_alive)
        self._end = weakref.finalize(self, self._server.close)
        self.homes = Homes(accelerated.tiers, layers, self._server.homes, device)
        counts = [layer.count for layer in layers]
        self._tables = self.homes.above.split(counts)
        self._promotion = Promotion(accelerated, sum(counts))
        self._bundle_nbytes = max(layer.layout.nbytes for layer in layers)
        self._above = torch.zeros(tokens, layout.hidden, dtype=torch.float32, device=device)
        self._below = torch.zeros_like(self._above)
        self._server.start()

    # --- within a step ---------------------------------------------------------------------------------------

    def queue(
        self,
        graph: StepGraph,
        layer: ExpertsLayer,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """What `moe_step` computes, as operations of a graph: [T, H] in the dtype of `hidden`.

        Raises:
            CaptureError: the layer is given other shapes than those of a step.
        """
        if top_k_index.shape != self._routed.shape[1:]:
            raise CaptureError(f"{layer.name} is given {tuple(top_k_index.shape)} experts, not those of a step")
        number = self._number[layer.first_key]
        hidden = hidden.contiguous()
        ids, weights = top_k_index.to(torch.int64).contiguous(), top_k_weights.to(torch.float32).contiguous()
        ring(graph, self._box, number, hidden, ids, weights)
        graph.copy(self._routed[number], ids)
        sums = ExpertSums(layer, hidden, ids, weights, self._tables[number], self._above)
        graph.call(partial(self._accelerated.accelerator.sum_experts, sums))
        collect(graph, self._box, number, self._below)
        return (self._above + self._below).to(hidden.dtype)

    def _fetch(self, layer: int, _missing: list[int]) -> None:
        """On the server's thread, while whoever holds the runtime's lock waits for the step."""
        with self._tiers_lock:
            self.homes.fetch(layer, np.unique(self._box.ids.numpy()).tolist())

    # --- around one ------------------------------------------------------------------------------------------

    def announce(self) -> None:
        """A step is about to be done."""
        self.homes.follow()
        self._server.announce(len(self._layers))

    def check(self) -> None:
        """The step is done.

        Raises:
            DoorbellError, StorageError, StoreCorruptError: its outputs are not valid.
        """
        self._server.check()

    @property
    def routed(self) -> torch.Tensor:
        """Int64 [layers, T, k]: what the last step was routed to."""
        return self._routed

    def account(self, step_s: float) -> None:
        """Keep what a valid step did for `settle`, and make room for what the step before it found worth a copy."""
        self.settle()
        keys = (self._routed.numpy() + self._first_keys[:, None, None]).ravel()
        self._uncounted = _Routed(keys, self.homes.are_above(keys), self.homes.take_fetched())
        self._promotion.make_room(self._candidates, self._bundle_nbytes, step_s)
        self._candidates = []

    def disregard(self) -> None:
        """What the last step did is not to be counted: another pass does it again."""
        self.homes.take_fetched()

    def begin_copies(self) -> None:
        """Beside a step: begin to copy what room was made for."""
        # The server's thread fetches what the step waits for, and ends these then.
        with self._tiers_lock:
            self._promotion.begin()

    def settle(self) -> None:
        """Count the last step and tell policies of it, unless that is done: beside the next, or before another pass."""
        if self._uncounted is None:
            return
        (keys, was_above, fetched), self._uncounted = self._uncounted, None
        tiers = self._accelerated.tiers
        keys, first = np.unique(keys, return_index=True)
        below = keys[~was_above[first]]
        tiers.above.counters.hits += len(keys) - len(below)
        tiers.above.counters.misses += len(below)
        tiers.below.counters.hits += len(below) - fetched
        tiers.below.counters.misses += fetched
        self._promotion.note(keys)
        self._candidates = self._promotion.best_first(below)
        for tier, routed in ((tiers.above, keys), (tiers.below, below)):
            for one in filter(None, self._by_layer(routed)):
                # One by one: a layer that has to be read does not wait for all.
                with self._tiers_lock:
                    tier.policy.on_route(one)

    def _by_layer(self, keys: npt.NDArray[np.int64]) -> list[list[int]]:
        """Ascending keys, those of each layer."""
        ends = np.searchsorted(keys, self._first_keys[1:]).tolist()
        everything = keys.tolist()
        return [everything[start:end] for start, end in zip([0, *ends], [*ends, len(everything)], strict=True)]

    def close(self) -> None:
        """Stop the server. May be called again."""
        self._end()
