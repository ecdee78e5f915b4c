"""Prefixes of prompts, kept from one call and one process to the next."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from offload.errors import (
    InvalidArgumentError,
    PrefixRejectedWarning,
    StorageError,
    StoreCorruptError,
    UnsupportedOperationError,
)
from offload.hf.fused.kv_cache import GrowingLayer
from offload.hf.paged.layer import PagedLayer
from offload.kv.paging import Paging
from offload.kv.prefix import contents, describe, restored, sizes
from offload.kv.prefix_files import PrefixFiles, PrefixStatistics


class Prefixes:
    """Saves the KV cache of token sequences, and begins prompts with the longest one that fits.

    Attributes:
        files: where they are.
        statistics: so far.
    """

    def __init__(self, model: PreTrainedModel, paging: Paging, files: PrefixFiles, chunk_tokens: int) -> None:
        """Nothing is read yet.

        Args:
            model: whose prompts.
            paging: of its caches.
            files: see above.
            chunk_tokens: tokens that go through the model at once.
        """
        self.files = files
        self.statistics = PrefixStatistics()
        self._model = model
        self._paging = paging
        self._chunk_tokens = chunk_tokens

    def save(self, input_ids: torch.Tensor) -> Path:
        """Compute the cache of a sequence and write it; see `PrefixFiles.save`.

        Args:
            input_ids: int64 [1, tokens].

        Raises:
            InvalidArgumentError: another shape.
            UnsupportedOperationError: a layer of the model keeps more than keys and values of all tokens.
            DoesNotFitError, StorageError: it is too large, or cannot be written.
        """
        if input_ids.ndim != 2 or len(input_ids) != 1 or input_ids.shape[1] == 0 or input_ids.is_floating_point():
            raise InvalidArgumentError(f"input_ids: expected int64 [1, tokens], found {list(input_ids.shape)}")
        cache = DynamicCache(config=self._model.config)
        with torch.no_grad():
            for chunk in torch.split(input_ids, self._chunk_tokens, dim=1):
                self._model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tables = []
        for layer in cache.layers:
            if type(layer) is not PagedLayer or layer.table is None:
                raise UnsupportedOperationError(
                    f"a prefix of this model cannot be saved: a layer of its cache is a {type(layer).__name__}, which "
                    "keeps more, or less, than keys and values of all tokens"
                )
            tables.append(layer.table)
        description = {"dtype": str(self._model.dtype), "layers": [describe(table) for table in tables]}
        nbytes = [size for table in tables for size in sizes(table)]
        blocks = (block for table in tables for block in contents(table))
        path = self.files.save(input_ids[0].numpy(), description, nbytes, blocks)
        self.statistics.saved += 1
        return path

    def begin(self, cache: object, input_ids: torch.Tensor) -> int:
        """Put the longest saved prefix of all sequences into an empty cache; how many tokens that are.

        At least one token of a prompt is left to be computed. A file that cannot be used is removed, with a warning.
        """
        if not _is_fresh(cache) or input_ids.ndim != 2:
            return 0
        same = int((input_ids == input_ids[:1]).all(0).long().cumprod(0).sum())
        tokens = input_ids[0, : min(same, input_ids.shape[1] - 1)].numpy()
        count = self.files.longest(tokens)
        if count == 0:
            return 0
        try:
            layers = self._read(tokens[:count])
        except (StoreCorruptError, StorageError) as error:
            self._reject(tokens[:count], error)
            return 0
        if len(input_ids) > 1:
            for layer in layers:
                layer.batch_repeat_interleave(len(input_ids))
        cache.layers[:] = layers  # type: ignore[attr-defined]
        self.statistics.reused += 1
        self.statistics.reused_tokens += count
        return count

    def _read(self, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> list[PagedLayer]:
        with self.files.open(tokens) as saved:
            if saved.description["dtype"] != str(self._model.dtype):
                raise StoreCorruptError(f"a saved prefix is of {saved.description['dtype']}, not {self._model.dtype}")
            layers = []
            for description in saved.description["layers"]:
                table = restored(self._paging, description, saved.blocks)
                layers.append(PagedLayer.of(self._paging, table, self._model.dtype, self._model.device))
            return layers

    def _reject(self, tokens: np.ndarray[Any, np.dtype[np.int64]], error: Exception) -> None:
        self.statistics.rejected += 1
        # One that cannot be removed is refused the next time as well.
        with suppress(StorageError):
            self.files.remove(tokens)
        warnings.warn(
            f"a saved prefix of {len(tokens)} tokens is not used and is computed again: {error}",
            PrefixRejectedWarning,
            stacklevel=2,
        )


def _is_fresh(cache: object) -> bool:
    return (
        type(cache) is DynamicCache
        and cache.get_seq_length() == 0
        and all(type(layer) in (DynamicLayer, GrowingLayer, PagedLayer) for layer in cache.layers)
    )


def begin_prompts(model: PreTrainedModel, prefixes: Prefixes) -> None:
    """Let generate() begin with saved prefixes."""
    prefill: Callable[..., Any] = model._prefill  # type: ignore[assignment]

    @functools.wraps(prefill)
    def begun(input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], **rest: Any) -> Any:
        mask = model_kwargs.get("attention_mask")
        if model_kwargs.get("inputs_embeds") is None and (mask is None or (mask.ndim == 2 and bool(mask.all()))):
            prefixes.begin(model_kwargs.get("past_key_values"), input_ids)
        return prefill(input_ids, generation_config, model_kwargs, **rest)

    setattr(model, "_prefill", begun)  # noqa: B010 - nn.Module's annotations do not know methods
