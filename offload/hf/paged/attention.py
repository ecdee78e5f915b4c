"""Attention over cached states where they lie, whatever implementation the model's config names."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from offload.hf.fused.attention import tells_more
from offload.hf.fused.conditions import is_ordinary
from offload.hf.paged.latent import ExpandedStep
from offload.hf.paged.layer import Step
from offload.hf.paged.masks import padding_of
from offload.hf.paged.recognition import SINKS, is_softmax_attention
from offload.hf.paged.states import CachedStates
from offload.hf.wrapped_attention import Attention, wrap_attention
from offload.kv.attention import attend_by_segments, attend_few
from offload.kv.table import BlockTable


def page_attention(model: PreTrainedModel) -> int:
    """Let every module that dispatches through transformers' interface attend to cached states; returns how many."""
    return wrap_attention(model, _wrap)


def _wrap(function: Attention) -> Attention:
    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **named: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if type(key) is not CachedStates:
            return function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **named)
        step: Step | ExpandedStep = key.step
        told = attention_mask, dropout, scaling, named
        reason = _obstacle(function, module, query, value, step, told)
        if reason is None:
            out = _paged(module, query, step, told)
            if out is not None:
                step.paging.note_paged()
                return out.transpose(1, 2).to(query.dtype).contiguous(), None
            reason = "an attention mask is not that of causal attention with padding"
        key, value = (step.gather(side, f"{type(module).__name__}: {reason}") for side in (0, 1))
        return function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **named)

    return attend


Told = tuple[torch.Tensor | None, float, float | None, dict[str, Any]]


def _obstacle(
    function: Attention, module: torch.nn.Module, query: torch.Tensor, value: torch.Tensor, step: object, told: Told
) -> str | None:
    """Why attention cannot be computed where the blocks lie; None where it can."""
    _, dropout, _, named = told
    if type(value) is not CachedStates or value.step is not step or not is_ordinary(query):
        return "its query, keys or values are not plain tensors of one update"
    if dropout or named.get("is_causal") is False:
        return "dropout, or attention that is not causal"
    if tells_more(named):
        return "a position bias, soft cap or attention weights are asked for"
    if not is_softmax_attention(function, module, SINKS in named):
        return f"{function.__name__} is not softmax attention as the kernels know it"
    return None


def _paged(module: torch.nn.Module, query: torch.Tensor, step: Step | ExpandedStep, told: Told) -> torch.Tensor | None:
    """[B, Hq, T, V] in fp32; None where the mask is another."""
    mask, _, scaling, named = told
    table = step.table
    padding = padding_of(mask, step.past, query.shape[2])
    if padding is None:
        return None
    valid = None if padding.all_valid else padding.valid
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    sinks = named.get(SINKS)
    few = query.shape[2] <= table.settings.few_tokens
    with torch.no_grad():
        if isinstance(step, ExpandedStep):
            if step.absorbs and few:
                return step.release(_few(table, step.absorb(query), scale, valid, sinks))
            if step.absorbs:
                _watch(step, step.absorb(query), scale, valid)
            elif table.sparsity is not None:
                step.paging.pool.counters.sparsity.refused.add("latents that are not absorbed are attended to in full")
        elif few:
            return _few(table, query, scale, valid, sinks)
        else:
            _watch(step, query, scale, valid)
        expand = step.expand if isinstance(step, ExpandedStep) else None
        held = table.held_valid(valid)
        return attend_by_segments(table, query, step.keys, step.values, scale, valid=held, sinks=sinks, expand=expand)


def _few(table: BlockTable, query: torch.Tensor, scale: float, valid: Any, sinks: torch.Tensor | None) -> torch.Tensor:
    """Where the blocks are: a query and its result are some KB, which cross, the blocks all that was cached."""
    there = None if sinks is None else sinks.cpu()
    return attend_few(table, query.cpu(), scale, valid=valid, sinks=there).to(query.device)


def _watch(step: Step | ExpandedStep, query: torch.Tensor, scale: float, valid: Any) -> None:
    """Show a long pass to what will leave tokens out."""
    sparsity = step.table.sparsity
    if sparsity is not None and sparsity.watches_prompts:
        sparsity.watch(step.table, query.cpu(), scale, valid)
