"""Which decode steps are replayed, and which go layer by layer."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from formats.packed import round_up
from offload.errors import CaptureError, DeviceError, DoorbellError, SlowDeviceWarning
from offload.hf.fused.conditions import returns_hidden_and_cache
from offload.hf.fused.kv_cache import ROOM_TOKENS, fuse_kv_cache
from offload.hf.fused.swap import STACK, Fused, swap
from offload.hf.fused.watch import Watch
from offload.hf.graphs.attention import group_attention
from offload.hf.graphs.decode_graph import DecodeGraph, why_not_held
from offload.hf.quantised_linear import QuantisedLinear
from offload.runtime import Runtime
from offload.step_graph.experts import GraphExperts, why_not_captured
from offload.step_graph.figures import GraphFigures
from offload.step_graph.no_experts import NoExperts

LEAST_ROOM_TOKENS = 256
"""A graph attends to all columns of its buffers: they double from here on."""

_MOST_GRAPHS = 4
_PROOFS = 3
"""Steps that may differ from the layers' own before graphs are given up."""

_PROOF, _FIRST_TOKEN = "a graph is proven", "the cache is empty"
_EXPECTED = {_PROOF, _FIRST_TOKEN}
"""Reasons of which nobody need be warned."""

_LISTENED = "a hook, an adapter or other weights are in the decoder"

_ATTENTION = ("sdpa", "eager")
_KINDS = {"full_attention", "sliding_attention", "linear_attention"}

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.1}
"""Relative distance of hidden states: sums in another order, and choices of routers that nearly tie."""


class StepGraphs:
    """The graphs of one model.

    The first step of a graph is done three ways: layer by layer, which is the result, queued, and replayed. Only where
    all of them agree are later steps replayed.

    Attributes:
        figures: what was done so far.
    """

    def __init__(self, model: PreTrainedModel, runtime: Runtime) -> None:
        """Nothing is captured yet.

        Args:
            model: carried by the runtime.
            runtime: with an accelerator.
        """
        assert runtime.accelerated is not None
        self.figures = GraphFigures()
        self._runtime, self._accelerated = runtime, runtime.accelerated
        self._decoder: Any = model.get_decoder()
        self._device = model.device
        self._experts: dict[int, GraphExperts | NoExperts] = {}
        self._graphs: list[DecodeGraph] = []
        self._declined: weakref.WeakKeyDictionary[DynamicCache, str] = weakref.WeakKeyDictionary()
        self._told: set[str] = set()
        self._proofs_left = _PROOFS
        self._process = os.getpid()
        self._output: type[Any] = object
        self._most_routed: dict[int, int] = {}
        self._watch = Watch(self._decoder.modules())
        # While these keep weights' memory, a step may begin before it is known that they are still the model's.
        self._kept: list[torch.Tensor] = []
        swap(self._decoder, _forward)
        self._decoder.__dict__[STACK] = self
        reason = self._why_not()
        if reason is not None:
            self._give_up(reason)

    def _why_not(self) -> str | None:
        """The reason why no step of this model can be captured."""
        runtime, config = self._runtime, self._decoder.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        if runtime.paging is not None:
            return "its KV cache lies in blocks"
        if runtime.dense is not None and runtime.dense.window is not None:
            return "dense weights stream through a window; give more vram="
        packed = any(isinstance(module, QuantisedLinear) for module in self._decoder.modules())
        if packed and self._device.type == "cpu":
            return "packed dense layers on the CPU are no operations of torch's"
        if config._attn_implementation not in _ATTENTION:
            return f"attention is {config._attn_implementation}, not one of {', '.join(_ATTENTION)}"
        if not kinds <= _KINDS:
            return f"it has layers of {', '.join(sorted(kinds - _KINDS))}"
        return why_not_captured(runtime.layers, [experts.top_k for experts in runtime.spec.experts])

    def _give_up(self, reason: str) -> str:
        self.figures.reason = reason
        self._graphs.clear()
        self._kept.clear()
        self._tell(reason)
        return reason

    def _tell(self, reason: str) -> None:
        """Warn, of each reason once."""
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(
                f"step_graph=: decode steps of {self._runtime.plan.model} go layer by layer: {reason}",
                SlowDeviceWarning,
                stacklevel=2,
            )

    def _decline(self, cache: DynamicCache, reason: str) -> str:
        self._declined[cache] = reason
        return reason

    # --- one forward -----------------------------------------------------------------------------------------

    def begin(self, cache: DynamicCache) -> None:
        """An empty cache is about to be filled: where it can, it begins in the buffers of a graph."""
        with self._runtime.lock:
            self.settle()
            if self.figures.reason:
                return
            graph = next((graph for graph in self._graphs if graph.is_free()), None)
            if graph is not None:
                graph.offer(cache)

    def run(self, args: tuple[Any, ...], passed: dict[str, Any]) -> Any:
        """The output for one new token of each sequence; None where the model's own code must run."""
        ids, cache = passed.get("input_ids"), passed.get("past_key_values")
        if (
            args
            or type(ids) is not torch.Tensor
            or ids.dim() != 2
            or ids.shape[1] != 1
            or type(cache) is not DynamicCache
            or not cache.layers
        ):
            return None
        with self._runtime.lock:
            reason = self._why_not_now(ids, cache, passed)
            if reason is None:
                with torch.inference_mode(mode=False), torch.no_grad():
                    done = self._run(ids, cache, passed)
                if not isinstance(done, str):
                    return done
                reason = done
            self.settle()
            self.figures.note_layer_by_layer(reason)
            if reason not in _EXPECTED and not self._runtime.closed:
                self._tell(reason)
            return None

    def _why_not_now(self, ids: torch.Tensor, cache: DynamicCache, passed: dict[str, Any]) -> str | None:
        """The reason why this step cannot be replayed; None where it may be."""
        mask, past = passed.get("attention_mask"), int(cache.get_seq_length())
        fits = mask is None or (isinstance(mask, torch.Tensor) and mask.shape == (len(ids), past + 1))
        reasons: tuple[tuple[Callable[[], object], str], ...] = (
            (lambda: self.figures.reason, self.figures.reason),
            (lambda: self._runtime.closed, "the runtime was closed"),
            (lambda: cache in self._declined, self._declined.get(cache, "")),
            (lambda: self._process != os.getpid(), "this process is a fork"),
            (lambda: past == 0, _FIRST_TOKEN),
            (lambda: ids.dtype is not torch.int64 or ids.device != self._device, "ids are not int64 on the device"),
            (lambda: not fits, "the mask is not [sequences, tokens]"),
            (lambda: not returns_hidden_and_cache(self._decoder.config, passed), "more is asked for than tokens"),
            (lambda: torch.is_autocast_enabled(self._device.type), "autocast is on"),
            (lambda: not self._has_slots(len(ids)), "RAM has no slot for each expert of a step; give more ram="),
        )
        return next((reason for is_so, reason in reasons if is_so()), None)

    def _has_slots(self, batch: int) -> bool:
        """Whether all experts of one request fit into host memory at once, beside copies that are under way."""
        most = self._most_routed.get(batch)
        if most is None:
            each = (min(batch * experts.top_k, experts.count) for experts in self._runtime.spec.experts)
            most = max(each, default=0)
            self._most_routed[batch] = most
        return self._runtime.tier.table.usable_slots >= most

    def _run(self, ids: torch.Tensor, cache: DynamicCache, passed: dict[str, Any]) -> Any:
        """The output; the reason where there is none."""
        past = int(cache.get_seq_length())
        going_on = next((graph for graph in self._graphs if graph.goes_on(cache, past)), None) if self._kept else None
        if going_on is not None:
            going_on.set_token(past, ids, passed.get("position_ids"), passed.get("attention_mask"))
            return self._replay(going_on, cache, self._watch.finds_nothing)
        if not self._watch.finds_nothing():
            return self._stop_trusting()
        if not self._kept:
            self._kept = self._watch.aliases()
        graph = self._graph_of(cache)
        if isinstance(graph, str):
            return graph
        if not graph.set(cache, ids, passed.get("position_ids"), passed.get("attention_mask")):
            return self._decline(cache, "a cache was rearranged between steps")
        if not graph.captured:
            return self._prove(graph, ids, cache, passed)
        return self._replay(graph, cache, lambda: True)

    def _stop_trusting(self) -> str:
        """Look before steps, not beside them, until nothing is found; weights that were replaced are let go."""
        self._kept.clear()
        return _LISTENED

    def _replay(self, graph: DecodeGraph, cache: DynamicCache, finds_nothing: Callable[[], bool]) -> Any:
        """A step of a graph that was set.

        Args:
            graph: captured.
            cache: whose tokens are there.
            finds_nothing: looks beside the step whether the model is what was captured; where it is not, the step is
                as if it had not been.
        """
        found: list[bool] = []

        def meanwhile() -> None:
            self._experts[graph.batch].begin_copies()
            found.append(finds_nothing())
            # What is counted and learnt of the step before takes no time of this one's.
            self.settle()

        before = perf_counter()
        self._do(graph, partial(graph.graph.replay, meanwhile))
        seconds = perf_counter() - before
        experts = self._experts[graph.batch]
        if not all(found):
            experts.disregard()
            return self._stop_trusting()
        graph.written(cache)
        experts.account(seconds)
        self._runtime.note_graph_step(experts.routed, seconds)
        self.figures.replayed += 1
        return self._output(last_hidden_state=graph.hidden.clone(), past_key_values=cache)

    def _graph_of(self, cache: DynamicCache) -> DecodeGraph | str:
        """A graph that holds the cache or can; the reason where there is none."""
        held = next((graph for graph in self._graphs if graph.holds(cache)), None)
        if held is not None:
            return held
        reason = why_not_held(cache)
        if reason is not None:
            return self._decline(cache, reason)
        past = int(cache.get_seq_length())
        for graph in self._graphs:
            if graph.is_free() and graph.suits(cache) and past < graph.room:
                graph.lend(cache)
                return graph
        self._graphs = [graph for graph in self._graphs if not graph.is_free()]
        if len(self._graphs) >= _MOST_GRAPHS:
            return f"more than {_MOST_GRAPHS} caches are in use at once"
        outgrown = [graph for graph in self._graphs if graph.is_lent_to(cache)]
        try:
            graph = DecodeGraph(
                self._decoder, self._decoder.plain.forward, cache, self._accelerated.accelerator.step_graph(),
                self._room(past),
            )  # fmt: skip
        except torch.OutOfMemoryError:
            return self._give_up(
                f"no memory for KV buffers of {self._room(past)} tokens; give more vram= or less context="
            )
        graph.lend(cache)
        # Its buffers are free when the tokens have moved on, and too small for the next cache.
        self._graphs = [one for one in self._graphs if one not in outgrown] + [graph]
        return graph

    def _room(self, past: int) -> int:
        """Tokens of new buffers: twice as many as before, but no more than the plan has room for, unless it must be."""
        planned = round_up(self._runtime.plan.workload.context_tokens, ROOM_TOKENS)
        room = max(LEAST_ROOM_TOKENS, 1 << past.bit_length())
        return min(room, planned) if past < planned else room

    def _experts_of(self, batch: int) -> GraphExperts | NoExperts:
        layers, top_k = self._runtime.layers, self._runtime.spec.top_k
        if batch not in self._experts:
            self._experts[batch] = (
                GraphExperts(self._accelerated, layers, top_k, batch, self._device) if layers else NoExperts(batch)
            )
        return self._experts[batch]

    def _do(self, graph: DecodeGraph, what: Callable[[], None]) -> None:
        """One step of a graph, its experts at hand.

        Raises:
            DoorbellError, StorageError, StoreCorruptError: the outputs are not valid. As after any pass that failed,
                the cache is not either: windows and states are those of a step that it does not show.
        """
        experts = self._experts_of(graph.batch)
        experts.announce()
        try:
            what()
        finally:
            experts.check()

    def _prove(self, graph: DecodeGraph, ids: torch.Tensor, cache: DynamicCache, passed: dict[str, Any]) -> Any:
        """The step layer by layer, after it was queued, captured and replayed."""
        found: list[torch.Tensor] = []
        experts = self._experts_of(graph.batch)

        def queue(*request: Any) -> torch.Tensor:
            return experts.queue(graph.graph, *request)

        def step() -> None:
            self._runtime.queue = queue
            try:
                graph.step()
            finally:
                self._runtime.queue = None

        def capture() -> None:
            graph.disguise()
            graph.graph.capture(step)

        ways: tuple[Callable[[], None], ...] = (lambda: graph.graph.run(step), capture, graph.graph.replay)
        try:
            for way in ways:
                graph.set(cache, ids, passed.get("position_ids"), passed.get("attention_mask"))
                graph.hidden.fill_(torch.nan)
                self._do(graph, way)
                found.append(graph.hidden.clone())
                graph.forget()
        except (CaptureError, DeviceError) as error:
            if isinstance(error, DoorbellError):
                raise
            return self._give_up(str(error))
        except torch.OutOfMemoryError:
            return self._give_up("no memory for a captured step; give more vram=")
        output = self._decoder.plain.forward(self._decoder, **passed)
        self._output = type(output)
        self.figures.note_layer_by_layer(_PROOF)
        expected = output.last_hidden_state
        # A capture may compute nothing.
        if all(_distance(one, expected) <= _TOLERANCE[expected.dtype] for one in (found[0], found[2])):
            graph.note_captured(cache)
            self.figures.captured += 1
        else:
            self._proofs_left -= 1
            if not self._proofs_left:
                self._give_up("a captured step does not give what the layers give")
        return output

    def settle(self) -> None:
        """Count the last step and tell policies of it, which is otherwise done beside the next. Call with the lock."""
        for experts in self._experts.values():
            experts.settle()

    def close(self) -> None:
        """Stop serving. May be called again."""
        self.settle()
        for experts in self._experts.values():
            experts.close()
        self._graphs.clear()
        self._kept.clear()


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to what was expected; NaN, which is below no bound, where one of them has a NaN."""
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def _forward(self: Fused, *args: Any, **kwargs: Any) -> Any:
    graphs: StepGraphs | None = self.__dict__.get(STACK)
    done = None if graphs is None else graphs.run(args, kwargs)
    return self.plain.forward(self, *args, **kwargs) if done is None else done


def use_step_graphs(model: PreTrainedModel, runtime: Runtime) -> StepGraphs:
    """Let decode steps be replayed where they can be.

    Args:
        model: carried by the runtime.
        runtime: with an accelerator.
    """
    graphs = StepGraphs(model, runtime)
    if not graphs.figures.reason:
        group_attention(model)
    fuse_kv_cache(model)

    def begin(_module: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if type(cache) is DynamicCache and not cache.get_seq_length():
            graphs.begin(cache)

    model.register_forward_pre_hook(begin, with_kwargs=True)
    return graphs
