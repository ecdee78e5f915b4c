"""KV cache layers of a captured step: buffers that stay where they are, written at a position that is a tensor.

They hold the tokens of a `DynamicCache` while steps are replayed; its own layers show them.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer, LinearAttentionLayer

from offload.hf.fused.kv_cache import GrowingLayer


class StepLayer(ABC):
    """A layer of a captured step's cache, in the place of one of a `DynamicCache`."""

    @abstractmethod
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """What stays where it is."""

    @abstractmethod
    def suits(self, layer: Any) -> bool:
        """Whether a dynamic layer's tokens are of this form."""

    @abstractmethod
    def take_over(self, layer: Any, past: int) -> bool:
        """Hold what a dynamic layer holds; False where its tokens were here and are elsewhere now."""

    @abstractmethod
    def hand_back(self, layer: Any, past: int) -> None:
        """Let the dynamic layer show the token that was written after `past` others."""


class AttentionLayer(CacheLayerMixin, StepLayer):
    """Keys [B, H, columns, D] and values [B, H, columns, V] at fixed addresses.

    Attributes:
        position: int64 [1], the place of the token that a step adds.
        columns: tokens of the buffers.
    """

    is_compileable = True
    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, position: torch.Tensor, columns: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make empty buffers.

        Args:
            position: see above.
            columns: see above.
            keys: [B, H, any, D], whose shape, dtype and device are taken.
            values: [B, H, any, V], likewise.
        """
        super().__init__()
        self.position, self.columns = position, columns
        # Zeros: what no token was written to is masked, and 0 x NaN is NaN.
        self.keys = keys.new_zeros(*keys.shape[:2], columns, keys.shape[3])
        self.values = values.new_zeros(*values.shape[:2], columns, values.shape[3])
        self.is_initialized = True

    def suits(self, layer: Any) -> bool:
        """Whether a dynamic layer's tokens are of this form."""
        keys, values = layer.keys, layer.values
        return keys is not None and all(
            (new.shape[:2], new.shape[3], new.dtype, new.device) == (own.shape[:2], own.shape[3], own.dtype, own.device)
            for new, own in ((keys, self.keys), (values, self.values))
        )

    def buffers(self) -> tuple[torch.Tensor, ...]:
        """Keys and values."""
        return self.keys, self.values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Buffers were made with the layer."""

    def get_seq_length(self) -> Any:
        """A tensor: a number would be that of the capture."""
        return self.position

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns; masks are given from outside."""
        del query_length
        return self.columns, 0

    def get_max_length(self) -> int:
        """The columns."""
        return self.columns


class FullLayer(AttentionLayer):
    """All tokens, each in the column of its position."""

    _owner: weakref.ref[GrowingLayer] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token of each sequence; all columns."""
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values

    def suits(self, layer: Any) -> bool:
        """As of any layer; one whose tokens are here need not make the views that it shows of them."""
        here = isinstance(layer, GrowingLayer) and layer.lies_in((self.keys, self.values), layer.get_seq_length())
        return here or super().suits(layer)

    def take_over(self, layer: GrowingLayer, past: int) -> bool:
        """Its tokens move here, and its next ones are written here too.

        Once for a layer: one that is rearranged after that has keys that others may still look at, and they lie here.
        """
        known, self._owner = self._owner is not None and self._owner() is layer, weakref.ref(layer)
        if layer.lies_in((self.keys, self.values), past):
            return True
        if known:
            return False
        layer.move_to((self.keys, self.values))
        return True

    def hand_back(self, layer: GrowingLayer, past: int) -> None:
        """It shows one token more."""
        if not layer.lies_in((self.keys, self.values), past):
            raise RuntimeError("a KV cache layer was changed while a step was replayed")
        layer.wrote_one((self.keys, self.values))


class WindowLayer(AttentionLayer):
    """The last tokens, the newest in the last column. What a dynamic layer shows of them changes with the next step."""

    is_sliding = True
    _shown: tuple[weakref.ref[torch.Tensor], int] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Move all tokens one column on and write one of each sequence; all columns."""
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer.copy_(torch.cat((buffer[:, :, 1:], new), dim=2))
        return self.keys, self.values

    def take_over(self, layer: DynamicSlidingWindowLayer, past: int) -> bool:
        """Its tokens are copied here, unless it still shows what was handed back."""
        if self._shown is not None and self._shown[0]() is layer.keys and self._shown[1] == past:
            return True
        held = min(past, self.columns - 1)
        assert layer.keys is not None and layer.values is not None
        if held:
            self.keys[:, :, -held:] = layer.keys[:, :, -held:]
            self.values[:, :, -held:] = layer.values[:, :, -held:]
        return True

    def hand_back(self, layer: DynamicSlidingWindowLayer, past: int) -> None:
        """It shows as many tokens as it keeps, which is one less than it attends to."""
        held = min(past + 1, self.columns - 1)
        first = self.columns - held
        layer.keys, layer.values = self.keys[:, :, first:], self.values[:, :, first:]
        layer.cumulative_length = past + 1
        self._shown = weakref.ref(layer.keys), past + 1


class StateLayer(LinearAttentionLayer, StepLayer):
    """States of linear attention, which its kernels update in place."""

    def __init__(self, like: LinearAttentionLayer) -> None:
        """Make states of the form of others."""
        super().__init__(like.number_of_states)
        self.device, self.dtype = like.device, like.dtype
        self.conv_kernel_size = dict(like.conv_kernel_size)
        self.has_previous_state = dict.fromkeys(range(like.number_of_states), True)
        self.is_conv_states_initialized = dict(like.is_conv_states_initialized)
        self.is_recurrent_states_initialized = dict(like.is_recurrent_states_initialized)
        for mine, its in zip(_states(self), _states(like), strict=True):
            mine.update({index: None if state is None else torch.zeros_like(state) for index, state in its.items()})

    def buffers(self) -> tuple[torch.Tensor, ...]:
        """All states."""
        return tuple(state for states in _states(self) for state in states.values() if state is not None)

    def suits(self, layer: Any) -> bool:
        """Whether its states are of these shapes, and none of the past is recorded."""
        if type(layer) is not LinearAttentionLayer or layer.record_past or not all(layer.has_previous_state.values()):
            return False
        return [_forms(states) for states in _states(layer)] == [_forms(states) for states in _states(self)]

    def take_over(self, layer: LinearAttentionLayer, past: int) -> bool:
        """Its states are copied here, unless they are these."""
        del past
        for mine, its in zip(_states(self), _states(layer), strict=True):
            for index, state in its.items():
                own = mine[index]
                if own is not None and state is not None and own is not state:
                    own.copy_(state)
        return True

    def hand_back(self, layer: LinearAttentionLayer, past: int) -> None:
        """These are its states from now on."""
        del past
        for mine, its in zip(_states(self), _states(layer), strict=True):
            its.update(mine)


_States = dict[int, torch.Tensor | None]


def _states(layer: LinearAttentionLayer) -> tuple[_States, _States]:
    return layer.conv_states, layer.recurrent_states


def _forms(states: _States) -> list[object]:
    return [None if state is None else (state.shape, state.dtype, state.device) for state in states.values()]
