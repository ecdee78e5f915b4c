"""Letting a model keep its caches in blocks."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from offload.hf.fused.kv_cache import GrowingLayer
from offload.hf.paged.attention import page_attention
from offload.hf.paged.latent import page_latents
from offload.hf.paged.layer import PagedLayer
from offload.kv.paging import Paging


def page_caches(model: PreTrainedModel, paging: Paging) -> int:
    """Let the model's forward turn plain layers of a `DynamicCache` into paged ones; layers of other kinds, whose
    memory does not grow or is not keys and values, stay.

    Returns:
        Modules that attend where blocks lie.
    """
    model.register_forward_pre_hook(functools.partial(_page, paging), with_kwargs=True, prepend=True)
    page_latents(model, paging)
    return page_attention(model)


def _page(paging: Paging, _module: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if type(cache) is not DynamicCache:
        return
    if cache.layer_class_to_replicate in (DynamicLayer, GrowingLayer):
        cache.layer_class_to_replicate = functools.partial(PagedLayer, paging)  # type: ignore[assignment]
    for index, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, GrowingLayer):
            paged = PagedLayer(paging)
            assert isinstance(layer, DynamicLayer)
            paged.adopt(layer.keys, layer.values)
            cache.layers[index] = paged
    tables = [layer.table for layer in cache.layers if type(layer) is PagedLayer and layer.table is not None]
    for table, follower in zip(tables, tables[1:] + tables[:1], strict=True):
        if follower is not table:
            table.follower = weakref.ref(follower)
