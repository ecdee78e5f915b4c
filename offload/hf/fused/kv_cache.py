"""A KV cache that grows in place: `DynamicCache` copies all keys and values of a layer for every new token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

ROOM_TOKENS = 64
"""Buffers hold a multiple of so many tokens; placement.planner counts them."""


class Room(NamedTuple):
    """Where the next token goes.

    Attributes:
        addresses: of the buffers of keys and values, [B, H, tokens, D] each, contiguous.
        tokens: that they hold at most.
        past: tokens that are there.
    """

    addresses: tuple[int, int]
    tokens: int
    past: int


class GrowingLayer(DynamicLayer):
    """Keys and values are views of buffers with room for tokens to come.

    What has been written is not written again: a layer that was set back other than by `crop`, and a copy of a
    layer, gets buffers of its own when it next grows.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, H, T, D] and return all keys and values [B, H, S, D]."""
        if key_states.requires_grad or value_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        if not self._may_extend(past):
            self._buffers: list[torch.Tensor | None] = [None, None]
        assert self.keys is not None and self.values is not None
        self.keys = self._extend(0, self.keys, key_states, past)
        self.values = self._extend(1, self.values, value_states, past)
        self._written, self._owner = past + key_states.shape[-2], id(self)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """As `DynamicLayer.crop`; the room is used again."""
        super().crop(tokens_to_remove)
        if self.__dict__.get("_owner") == id(self):
            self._written = min(self._written, self.get_seq_length())

    def room_for_one(self, batch: int, heads: int, width: int, dtype: torch.dtype) -> Room | None:
        """Room for one more token of each sequence; None where `update` has to make some, or the shape is another."""
        keys, values = self.keys, self.values
        if not self.is_initialized or keys is None or values is None or keys.dim() != 4:
            return None
        past = keys.shape[2]
        if not self._may_extend(past):
            return None
        key_buffer, value_buffer = self._buffers
        if key_buffer is None or value_buffer is None:
            return None
        shape = (batch, heads, key_buffer.shape[2], width)
        addresses = key_buffer.data_ptr(), value_buffer.data_ptr()
        if (
            past >= shape[2]
            or key_buffer.shape != shape
            or value_buffer.shape != shape
            or key_buffer.dtype is not dtype
            or value_buffer.dtype is not dtype
            or addresses != (keys.data_ptr(), values.data_ptr())
        ):
            return None
        return Room(addresses, shape[2], past)

    def took_one(self) -> None:
        """The room for one token has been written to."""
        key_buffer, value_buffer = self._buffers
        assert key_buffer is not None and value_buffer is not None
        self._written += 1
        self.keys = key_buffer.narrow(2, 0, self._written)
        self.values = value_buffer.narrow(2, 0, self._written)

    def _may_extend(self, past: int) -> bool:
        """Whether the tensors end where this very layer last wrote."""
        state = self.__dict__
        return state.get("_owner") == id(self) and state["_written"] == past

    def _extend(self, index: int, current: torch.Tensor, new: torch.Tensor, past: int) -> torch.Tensor:
        buffer = self._buffers[index]
        total = past + new.shape[-2]
        if (
            buffer is None
            or total > buffer.shape[-2]
            or buffer.shape[0] != new.shape[0]
            or current.data_ptr() != buffer.data_ptr()
            or (buffer.is_inference() and not torch.is_inference_mode_enabled())
        ):
            room = -(-total // ROOM_TOKENS) * ROOM_TOKENS
            buffer = new.new_empty(*new.shape[:-2], room, new.shape[-1])
            if past:
                buffer[..., :past, :] = current
            self._buffers[index] = buffer
        buffer[..., past:total, :] = new
        return buffer[..., :total, :]


def fuse_kv_cache(model: PreTrainedModel) -> int:
    """Let the model's forward turn plain layers of a `DynamicCache` into growing ones; returns 1."""
    model.register_forward_pre_hook(_grow, with_kwargs=True)
    return 1


def _grow(_module: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if type(cache) is not DynamicCache:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer
