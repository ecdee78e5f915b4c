"""A cache layer of transformers whose tokens lie in blocks."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer

from offload.errors import UnsupportedOperationError
from offload.hf.paged.states import cached_states
from offload.kv.paging import Paging
from offload.kv.table import BlockTable


class Step:
    """One update of a layer, as attention sees it.

    Attributes:
        table: the layer's tokens, the new ones among them.
        past: tokens before them, evicted ones too.
        keys: the new ones, as they came.
        values: the new ones.
    """

    def __init__(self, layer: PagedLayer, table: BlockTable, past: int, new: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.table = table
        self.past = past
        self.keys, self.values = new
        self._layer = layer
        self._gathered: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def paging(self) -> Paging:
        """The layer's."""
        return self._layer.paging

    def gather(
        self, side: int, reason: str = "a model computes with its cached keys and values itself"
    ) -> torch.Tensor:
        """All keys (0) or values (1) as an ordinary tensor, the new ones as they came; the reason is counted."""
        if self._gathered is None:
            self._layer.paging.note_gathered(reason)
            old = self._layer.tensors(self.past)
            new = self.keys, self.values
            self._gathered = torch.cat([old[0], new[0]], 2), torch.cat([old[1], new[1]], 2)
        return self._gathered[side]


class PagedLayer(DynamicLayer):
    """Keys and values of one layer in blocks of a pool.

    The first tokens go to attention as they came; later on `CachedStates` do, which attention recognises. `keys` and
    `values` gather all tokens for whoever asks, and cannot be set.

    Attributes:
        paging: what all layers of a model share.
        table: None before the first token.
    """

    def __init__(self, paging: Paging | None = None, **kwargs: Any) -> None:
        """An empty layer."""
        assert paging is not None
        self.paging = paging
        self.table: BlockTable | None = None
        self.is_initialized = False
        self._dtype: torch.dtype | None = None

    @classmethod
    def of(cls, paging: Paging, table: BlockTable, dtype: torch.dtype, device: torch.device) -> PagedLayer:
        """A layer whose tokens are in a table already, for a model that computes in a dtype on a device."""
        layer = cls(paging)
        layer.dtype, layer.device, layer._dtype = dtype, device, dtype
        layer.table, layer.is_initialized = table, True
        return layer

    @property
    def keys(self) -> torch.Tensor | None:
        """[B, H, S, D], gathered."""
        return None if self.table is None else self.tensors(self.table.tokens)[0]

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        _refuse_assignment(value)

    @property
    def values(self) -> torch.Tensor | None:
        """[B, H, S, V], gathered."""
        return None if self.table is None else self.tensors(self.table.tokens)[1]

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        _refuse_assignment(value)

    def tensors(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first so many tokens.

        Raises:
            UnsupportedOperationError: some of them were evicted.
        """
        table = self.table
        assert table is not None and self._dtype is not None
        if table.evicted is not None:
            raise UnsupportedOperationError(
                f"a KV cache that evicted {table.evicted.tokens} tokens of each sequence has no keys and values of all "
                "tokens to gather, copy into another cache or pickle; load without kv_sparsity=, or with top-k, which "
                "keeps them"
            )
        rows = [table.read(row, 0, tokens, self._dtype) for row in range(table.sequences)]
        keys, values = (torch.stack([row[side] for row in rows]).to(self.device) for side in (0, 1))
        latent = table.layouts.plain.value_from_key
        return (keys[..., :latent], keys[..., latent:]) if latent else (keys, values)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the table; how its blocks lie follows from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._dtype = key_states.dtype
        self.table = self.paging.make_table(key_states, value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, H, T, D]; what is returned stands for all keys and values [B, H, S, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        table = self.table
        assert table is not None
        past = table.length
        self._append(key_states, value_states)
        if past == 0 and not (table.sparsity is not None and table.sparsity.watches_prompts):
            return key_states, value_states
        step = Step(self, table, past, (key_states, value_states))
        keys, values = (
            cached_states((*new.shape[:2], table.length, new.shape[3]), new, step, functools.partial(step.gather, side))
            for side, new in enumerate((key_states, value_states))
        )
        return keys, values

    def _append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        table = self.table
        assert table is not None
        if table.layouts.plain.value_from_key:
            table.append(torch.cat([keys, values], -1).detach(), None)
        else:
            table.append(keys.detach(), values.detach())

    def get_seq_length(self) -> int:
        """Tokens, evicted ones too."""
        return 0 if self.table is None else self.table.length

    def reset(self) -> None:
        """Forget all tokens."""
        self.table = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """As `DynamicLayer.crop`.

        Raises:
            UnsupportedOperationError: tokens that would be left are evicted; nothing has changed.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): expected a negative number, of tokens to remove, or 0")
        if self.table is not None:
            # Assisted generation may count in a tensor.
            self.table.crop(max(0, self.table.tokens + int(tokens_to_remove)))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let the sequences be those of some beams; what they have in common is shared."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times."""
        if self.table is not None:
            self.table.select(np.repeat(np.arange(self.table.sequences), repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some sequences."""
        if self.table is not None:
            self.table.select(np.arange(self.table.sequences)[indices.cpu().numpy()])

    def offload(self) -> None:
        """Blocks leave by themselves."""

    def prefetch(self) -> None:
        """Blocks are read ahead by themselves."""

    def adopt(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        """Take over tokens that another class of layer holds."""
        if keys is not None and values is not None and keys.numel():
            self.lazy_initialization(keys, values)
            self._append(keys, values)

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedLayer:
        other = PagedLayer(self.paging)
        if self.table is not None:
            other.dtype, other.device, other._dtype = self.dtype, self.device, self._dtype
            other.table, other.is_initialized = self.table.copy(), True
        return other

    def __reduce__(self) -> Any:
        # Blocks belong to this process: elsewhere the layer is one that holds its tokens itself.
        return _plain_layer, (self.keys, self.values)


def _plain_layer(keys: torch.Tensor | None, values: torch.Tensor | None) -> DynamicLayer:
    layer = DynamicLayer()
    if keys is not None and values is not None:
        layer.update(keys, values)
    return layer


def _refuse_assignment(value: torch.Tensor | None) -> None:
    if value is not None:
        raise UnsupportedOperationError(
            "keys and values of a paged KV cache cannot be assigned, for they lie in blocks; use crop(), "
            "batch_select_indices() or reorder_cache(), or load with a KV cache that fits in RAM"
        )
