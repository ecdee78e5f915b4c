"""A KV cache that grows in place: `DynamicCache` copies all keys and values of a layer for every new token."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from formats.packed import round_up
from placement.planner import KV_ROOM_TOKENS

ROOM_TOKENS = KV_ROOM_TOKENS
"""Buffers hold a multiple of so many tokens, which plans count."""


Form = tuple[int, int, int, torch.dtype]
"""Sequences, heads, width of a head, dtype."""


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


class _Ahead(NamedTuple):
    """The room that a tape writes to, which keys and values do not show yet.

    Attributes:
        form: of the buffers.
        buffers: of keys and values.
        addresses, tokens: see `Room`.
    """

    form: Form
    buffers: tuple[torch.Tensor, torch.Tensor]
    addresses: tuple[int, int]
    tokens: int


class GrowingLayer(DynamicLayer):
    """Keys and values are views of buffers with room for tokens to come.

    What has been written is not written again: a layer that was set back other than by `crop`, and a copy of a
    layer, gets buffers of its own when it next grows. The views of tokens that a tape wrote are made when asked for.
    """

    @property
    def keys(self) -> torch.Tensor | None:
        """[B, H, S, D]; None before the first token."""
        self._catch_up()
        return self.__dict__["keys"]  # type: ignore[no-any-return]

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._catch_up()
        self.__dict__["keys"] = keys

    @property
    def values(self) -> torch.Tensor | None:
        """As `keys`."""
        self._catch_up()
        return self.__dict__["values"]  # type: ignore[no-any-return]

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._catch_up()
        self.__dict__["values"] = values

    def get_seq_length(self) -> int:
        """Tokens that are there."""
        state = self.__dict__
        return int(state["_written"]) if state.get("_ahead") is not None else super().get_seq_length()

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

    def move_to(self, buffers: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Go on in other buffers, [B, H, tokens, D] of keys and of values, with room for what is here; it is copied."""
        current = self.keys, self.values
        past = self.get_seq_length()
        shown: list[torch.Tensor] = []
        for buffer, tensor in zip(buffers, current, strict=True):
            assert tensor is not None
            # What is here may be a part of these very buffers, elsewhere in them.
            within = tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
            buffer[..., :past, :] = tensor.clone() if within else tensor
            shown.append(buffer[..., :past, :])
        self.keys, self.values = shown
        self._buffers = list(buffers)
        self._written, self._owner = past, id(self)

    def lies_in(self, buffers: tuple[torch.Tensor, torch.Tensor], past: int) -> bool:
        """Whether so many tokens are in these buffers, and the next one may be written there."""
        state = self.__dict__
        if not self.is_initialized or not self._may_extend(past) or past >= buffers[0].shape[-2]:
            return False
        ahead: _Ahead | None = state.get("_ahead")
        if ahead is not None:
            return all(mine is other for mine, other in zip(ahead.buffers, buffers, strict=True))
        return all(
            mine is other and shown is not None and shown.data_ptr() == other.data_ptr()
            for mine, other, shown in zip(self._buffers, buffers, (self.keys, self.values), strict=True)
        )

    def wrote_one(self, buffers: tuple[torch.Tensor, torch.Tensor]) -> None:
        """The next token of each sequence was written to buffers that this layer lies in."""
        keys, values = buffers
        batch, heads, tokens, width = keys.shape
        room = Room((keys.data_ptr(), values.data_ptr()), tokens, self.get_seq_length())
        self.took_one(room, (batch, heads, width, keys.dtype))

    def offer(self, buffers: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Buffers to begin in, if the first tokens fit; nobody else uses them. A copy of the layer does not either."""
        self.__dict__["_offered"] = id(self), buffers

    def room_for_one(self, form: Form) -> Room | None:
        """Room for one more token of each sequence, made where buffers are full; None where the form is another, or
        these are not the layer's own buffers.
        """
        state = self.__dict__
        ahead: _Ahead | None = state.get("_ahead")
        if ahead is not None and state["_owner"] == id(self) and ahead.form == form:
            past: int = state["_written"]
            if past < ahead.tokens:
                return Room(ahead.addresses, ahead.tokens, past)
        return self._new_room(form)

    def _new_room(self, form: Form) -> Room | None:
        keys, values = self.keys, self.values
        if not self.is_initialized or keys is None or values is None or keys.dim() != 4:
            return None
        past = keys.shape[2]
        if not self._may_extend(past):
            return None
        key_buffer, value_buffer = self._buffers
        if key_buffer is None or value_buffer is None:
            return None
        batch, heads, width, dtype = form
        shape = (batch, heads, key_buffer.shape[2], width)
        addresses = key_buffer.data_ptr(), value_buffer.data_ptr()
        if (
            key_buffer.shape != shape
            or value_buffer.shape != shape
            or key_buffer.dtype is not dtype
            or value_buffer.dtype is not dtype
            or addresses != (keys.data_ptr(), values.data_ptr())
        ):
            return None
        if past < shape[2]:
            return Room(addresses, shape[2], past)
        tokens = round_up(past + 1, ROOM_TOKENS)
        with torch.inference_mode(False):
            larger = keys.new_empty(batch, heads, tokens, width), values.new_empty(batch, heads, tokens, width)
            self.move_to(larger)
        return Room((larger[0].data_ptr(), larger[1].data_ptr()), tokens, past)

    def took_one(self, room: Room, form: Form) -> None:
        """The room for one token has been written to.

        Args:
            room: as `room_for_one` gave it.
            form: what it was asked for.
        """
        state = self.__dict__
        state["_written"] = room.past + 1
        if state.get("_ahead") is None:
            state["_ahead"] = _Ahead(form, tuple(state["_buffers"]), room.addresses, room.tokens)
            state["_mark"] = object()

    def _catch_up(self) -> None:
        """Let keys and values show all that was written."""
        state = self.__dict__
        ahead: _Ahead | None = state.get("_ahead")
        if ahead is not None:
            state["_ahead"] = state["_mark"] = None
            state["keys"], state["values"] = (buffer.narrow(2, 0, state["_written"]) for buffer in ahead.buffers)

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
            buffer = self._new_buffer(index, new, total)
            if past:
                buffer[..., :past, :] = current
            self._buffers[index] = buffer
        buffer[..., past:total, :] = new
        return buffer[..., :total, :]

    def _new_buffer(self, index: int, new: torch.Tensor, total: int) -> torch.Tensor:
        owner, offered = self.__dict__.get("_offered", (0, ()))
        if index:
            self.__dict__.pop("_offered", None)
        if owner == id(self):
            buffer: torch.Tensor = offered[index]
            batch, heads, room, width = buffer.shape
            if (
                new.shape[:-2] == (batch, heads)
                and new.shape[-1] == width
                and room >= total
                and (buffer.dtype, buffer.device) == (new.dtype, new.device)
            ):
                return buffer
        return new.new_empty(*new.shape[:-2], round_up(total, ROOM_TOKENS), new.shape[-1])


class Followed:
    """Layers whose next tokens one writer puts into their buffers, step by step: what it looks at is little.

    Anything else that is done to a layer ends what its keys do not show yet, or is seen by its tokens.
    """

    def __init__(self, layers: Iterable[GrowingLayer]) -> None:
        """Begin right after `wrote_one` of each."""
        self._layers = list(layers)
        self._states = [layer.__dict__ for layer in self._layers]
        # Marks instead of what they mark, which would keep buffers that a layer has left.
        self._marks = [state["_mark"] for state in self._states]

    def are_as_left(self, layers: list[Any], past: int) -> bool:
        """Whether these are the layers, with so many tokens, and nothing was done to them since."""
        return (
            len(layers) == len(self._layers)
            and all(map(is_, layers, self._layers))
            and all(map(is_, [state["_mark"] for state in self._states], self._marks))
            and [state["_written"] for state in self._states] == [past] * len(layers)
        )

    def wrote_one(self, past: int) -> None:
        """The next token of each, after so many, was written to the buffers, which have room for it."""
        for state in self._states:
            state["_written"] = past + 1


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
