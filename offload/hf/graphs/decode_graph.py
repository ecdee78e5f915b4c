"""One decode step of one decoder as a graph: for a number of sequences, and a number of tokens at most."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from offload.hf.fused.kv_cache import Followed, GrowingLayer
from offload.hf.graphs.attention import grouped_attention
from offload.hf.graphs.layers import FullLayer, StateLayer, StepLayer, WindowLayer
from offload.hf.graphs.masks import Masks
from offload.step_graph.graph import StepGraph

_FULL, _SLIDING = "full_attention", "sliding_attention"


def why_not_held(cache: DynamicCache) -> str | None:
    """The reason why a cache cannot be that of captured steps, None where it can."""
    layers: list[Any] = cache.layers
    for layer in layers:
        if type(layer) is LinearAttentionLayer:
            if layer.record_past or not all(layer.has_previous_state.values()):
                return "a layer of its cache has no state, or records the past"
            continue
        if type(layer) not in (GrowingLayer, DynamicSlidingWindowLayer):
            return f"a layer of its KV cache is a {type(layer).__name__}"
        if not layer.is_initialized or layer.keys is None or layer.keys.dim() != 4:
            return "a layer of its KV cache holds no keys of [batch, heads, tokens, width]"
    return None


class DecodeGraph:
    """Static inputs, KV buffers and outputs of a step, and its graph.

    Attributes:
        batch: sequences.
        room: tokens of each, at most.
        hidden: [batch, 1, H], what the last step gave.
        captured: whether the graph is there.
    """

    def __init__(
        self, decoder: Any, forward: Callable[..., Any], cache: DynamicCache, graph: StepGraph, room: int
    ) -> None:
        """Make buffers like those of a cache; they are free.

        Args:
            decoder: the model below its output layer.
            forward: its own.
            cache: one that `why_not_held` has nothing against.
            graph: to capture.
            room: see above.
        """
        keys = next(layer.keys for layer in cache.layers if isinstance(layer, DynamicLayer))
        assert keys is not None
        device, dtype = keys.device, keys.dtype
        self.batch, self.room, self.graph = int(keys.shape[0]), room, graph
        self.captured = False
        self._forward, self._decoder = forward, decoder
        config: Any = decoder.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        # Models whose layers are of several kinds take a mask for each.
        self._kinds = kinds if kinds - {_FULL} else set()
        self._ids = torch.zeros(self.batch, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(self.batch, 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._valid = torch.ones(self.batch, room, dtype=torch.bool, device=device)
        self.hidden = torch.zeros(self.batch, 1, config.hidden_size, dtype=dtype, device=device)
        self._layers = [self._layer_like(layer) for layer in cache.layers]
        windows = {layer.columns for layer in self._layers if isinstance(layer, WindowLayer)}
        self._windowed = bool(windows) and not any(isinstance(layer, FullLayer) for layer in self._layers)
        self._masks = Masks(
            self._position, self._valid, max(windows, default=None), dtype,
            added=config._attn_implementation == "eager",
        )  # fmt: skip
        self._cache = Cache(layers=list[Any](self._layers))
        self._lent: weakref.ref[DynamicCache] | None = None
        self._references: list[int] = []
        self._followed: Followed | None = None

    def _layer_like(self, layer: Any) -> StepLayer:
        if isinstance(layer, LinearAttentionLayer):
            return StateLayer(layer)
        if isinstance(layer, DynamicSlidingWindowLayer):
            assert layer.keys is not None and layer.values is not None
            return WindowLayer(self._position, layer.sliding_window, layer.keys, layer.values)
        return FullLayer(self._position, self.room, layer.keys, layer.values)

    # --- whose tokens it holds -------------------------------------------------------------------------------

    def is_free(self) -> bool:
        """Whether nobody's cache is here, and nobody looks at what was."""
        if self._lent is not None and self._lent() is not None:
            return False
        # Its layers would live on, and show buffers.
        self._followed = None
        return not self._references or all(
            now <= then for now, then in zip(self._counts(), self._references, strict=True)
        )

    def holds(self, cache: DynamicCache) -> bool:
        """Whether the tokens of this cache are here, and it has room for one more."""
        return self.is_lent_to(cache) and cache.get_seq_length() < self.room and self.suits(cache)

    def goes_on(self, cache: DynamicCache, past: int) -> bool:
        """Whether the next step needs but its token: nothing was done to the cache since the last, of `past` tokens.

        Then all its layers keep whatever they keep by token, so that a step which they do not show is as good as none.
        """
        return (
            self._followed is not None
            and past < self.room
            and self.is_lent_to(cache)
            and self._followed.are_as_left(cache.layers, past)
        )

    def is_lent_to(self, cache: DynamicCache) -> bool:
        """Whether the cache's tokens are here, or were."""
        return self._lent is not None and self._lent() is cache

    def suits(self, cache: DynamicCache) -> bool:
        """Whether the layers of a cache are of this form."""
        return len(cache.layers) == len(self._layers) and all(
            own.suits(layer) for own, layer in zip(self._layers, cache.layers, strict=True)
        )

    def offer(self, cache: DynamicCache) -> None:
        """Let an empty cache begin here, if what it is given is of this form; call while free."""
        self._lent = weakref.ref(cache)
        new: Any = cache.layer_class_to_replicate
        for index, own in enumerate(self._layers):
            if isinstance(own, FullLayer):
                while new is not None and len(cache.layers) <= index:
                    cache.layers.append(new())
                layer = cache.layers[index]
                if isinstance(layer, GrowingLayer):
                    layer.offer((own.keys, own.values))

    def lend(self, cache: DynamicCache) -> None:
        """Keep the tokens of a cache from now on; call while free."""
        self._lent = weakref.ref(cache)

    def _counts(self) -> list[int]:
        """References to each buffer."""
        buffers = [buffer for layer in self._layers for buffer in layer.buffers()]
        return [torch._C._storage_Use_Count(buffer.untyped_storage()._cdata) for buffer in buffers]

    # --- running ---------------------------------------------------------------------------------------------

    def set(
        self, cache: DynamicCache, ids: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> bool:
        """What the next step reads; False where the cache was rearranged since its tokens came here.

        Args:
            cache: whose tokens are here.
            ids: int64 [batch, 1].
            positions: int64 [batch or 1, 1], None for that of the token in the cache.
            mask: [batch, tokens and this one], 0 for padding; None for none.
        """
        past = int(cache.get_seq_length())
        taken = [own.take_over(layer, past) for own, layer in zip(self._layers, cache.layers, strict=True)]
        if not all(taken):
            return False
        self.set_token(past, ids, positions, mask)
        return True

    def set_token(
        self, past: int, ids: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> None:
        """What the next step reads beside the tokens that are here, `past` of them; see `set`."""
        self._ids.copy_(ids)
        self._position.fill_(past)
        if positions is None:
            self._positions.fill_(past)
        else:
            self._positions.copy_(positions.expand_as(self._positions))
        if mask is None:
            self._valid.fill_(True)
        else:
            self._valid[:, : past + 1].copy_(mask)

    def forget(self) -> None:
        """After a step that the cache does not show: its token is wiped out, so that a replay has to write it."""
        for layer in self._layers:
            if isinstance(layer, FullLayer):
                layer.keys.index_fill_(2, self._position, 0.0)
                layer.values.index_fill_(2, self._position, 0.0)

    def disguise(self) -> None:
        """After `set`: another token at the next place, so that what a capture leaves is not what a replay gives."""
        self._ids.copy_((self._ids + 1) % self._decoder.get_input_embeddings().num_embeddings)
        if int(self._position) + 1 < self.room:
            self._position.add_(1)
            self._positions.add_(1)

    def step(self) -> None:
        """The operations of a step."""
        mask: Any
        if self._kinds:
            mask = {kind: self._mask_of(kind) for kind in self._kinds}
        else:
            mask = self._mask_of(_SLIDING if self._windowed else _FULL)
        with grouped_attention():
            output = self._forward(
                self._decoder, input_ids=self._ids, attention_mask=mask, position_ids=self._positions,
                past_key_values=self._cache, use_cache=True,
            )  # fmt: skip
        self.hidden.copy_(output.last_hidden_state)

    def _mask_of(self, kind: str) -> torch.Tensor | None:
        if kind == _FULL:
            return self._masks.full()
        # A state has seen no padding, and a new token is none.
        return self._masks.window() if kind == _SLIDING else None

    def written(self, cache: DynamicCache) -> None:
        """The cache shows the token of the last step."""
        past = int(cache.get_seq_length())
        if self.goes_on(cache, past):
            assert self._followed is not None
            self._followed.wrote_one(past)
            return
        for own, layer in zip(self._layers, cache.layers, strict=True):
            own.hand_back(layer, past)
        grown = [layer for layer in cache.layers if isinstance(layer, GrowingLayer)]
        full = all(isinstance(layer, FullLayer) for layer in self._layers)
        self._followed = Followed(grown) if full and len(grown) == len(self._layers) else None

    def note_captured(self, cache: DynamicCache) -> None:
        """The graph is there; what refers to the buffers now, the cache apart, always will."""
        self.captured = True
        shown = [
            sum(_looks_at(tensor, buffer) for tensor in (layer.__dict__.get("keys"), layer.__dict__.get("values")))
            for own, layer in zip(self._layers, cache.layers, strict=True)
            for buffer in own.buffers()
        ]
        self._references = [count - views for count, views in zip(self._counts(), shown, strict=True)]


def _looks_at(tensor: torch.Tensor | None, buffer: torch.Tensor) -> bool:
    """Whether a tensor is a view of a buffer."""
    return (
        tensor is not None
        and tensor is not buffer
        and tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    )
