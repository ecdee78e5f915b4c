"""From a skeleton to the planner's record of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from transformers import PreTrainedModel

from offload.hf.dtypes import FORMAT_OF_DTYPE
from offload.hf.experts_interface import experts_modules, remove_expert_weights, use_offload_experts
from offload.hf.layer_specs import head_spec, layer_specs
from offload.hf.quantise import parameters_of, quantised_nbytes
from offload.hf.sizes import (
    RunSizes,
    activation_nbytes_per_token,
    attention_nbytes_per_token,
    dense_weights,
    kept_products_nbytes,
    measure_on_meta,
)
from offload.quantisation import Quantisation
from offload.store.source import ExpertGroup
from placement.model_spec import ExpertsSpec, ModelSpec

_LOADER_THREADS = 4
"""transformers reads so many tensors at once; each may need a copy while it is cast."""


def measure_without_experts(skeleton: PreTrainedModel) -> RunSizes:
    """Take the experts off a skeleton and measure what is left, for `build_spec` in whatever formats.

    Args:
        skeleton: on meta; afterwards its experts have no parameters and dispatch to the offload implementation.

    Raises:
        UnsupportedModelError: the model cannot run on meta.
    """
    for _, module in experts_modules(skeleton):
        remove_expert_weights(module)
    use_offload_experts(skeleton)
    return measure_on_meta(skeleton)


def measured_once(skeleton: PreTrainedModel) -> Callable[[], RunSizes]:
    """`measure_without_experts` at the first call, kept for others: what formats refuse by name is refused before."""
    return cache(lambda: measure_without_experts(skeleton))


def build_spec(
    skeleton: PreTrainedModel,
    groups: Sequence[ExpertGroup],
    run: RunSizes,
    *,
    name: str,
    context_tokens: int,
    casts: bool,
    formats: Mapping[str, str],
    alone: Sequence[str],
    quantisation: Quantisation,
    decoding_nbytes: int = 0,
) -> ModelSpec:
    """The record of a model in certain formats.

    Args:
        skeleton: on meta, its experts taken off.
        groups: the routed experts.
        run: what `measure_without_experts` found of the skeleton.
        name: what the user called the model.
        context_tokens: longest sequence that will run.
        casts: True where weights are stored in another dtype than the model computes in.
        formats: packed formats of linear layers, by path.
        alone: those of them that are read one at a time; the others are loaded whole before they are packed.
        quantisation: what was asked for.
        decoding_nbytes: what decoding one dense tensor of a quantised checkpoint takes.
    """
    dtype: torch.dtype = skeleton.dtype
    dense = dense_weights(skeleton, dtype)
    largest = max(dense.values()) * (1 + _LOADER_THREADS if casts else 1)
    originals = {name: sum(dense.pop(own, 0) for own in parameters_of(skeleton, name)) for name in formats}
    dense |= quantised_nbytes(skeleton, formats)
    whole = sum(nbytes for name, nbytes in originals.items() if name not in alone)
    config = skeleton.config.get_text_config()
    head, head_is_shared = head_spec(skeleton, formats)
    return ModelSpec(
        name=name,
        model_type=skeleton.config.model_type,
        dtype=FORMAT_OF_DTYPE[dtype],
        dense_format=quantisation.dense or FORMAT_OF_DTYPE[dtype],
        head_format=quantisation.lm_head or FORMAT_OF_DTYPE[dtype],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layer_count=config.num_hidden_layers,
        max_context_tokens=getattr(config, "max_position_embeddings", None) or context_tokens,
        dense_nbytes=sum(dense.values()),
        load_scratch_nbytes=largest + whole + _LOADER_THREADS * decoding_nbytes,
        kv_nbytes_per_token=run.kv_nbytes_per_token,
        kv_fixed_nbytes=run.kv_fixed_nbytes,
        activation_nbytes_per_token=activation_nbytes_per_token(
            skeleton, max((group.count for group in groups), default=0), context_tokens, quantised=bool(formats)
        ),
        attention_nbytes_per_token=attention_nbytes_per_token(skeleton),
        experts=tuple(
            ExpertsSpec(group.module, group.count, run.top_k[group.module], group.layout) for group in groups
        ),
        layers=layer_specs(skeleton, groups, dense, run.kv_nbytes_per_token_by_layer, formats),
        head=head,
        head_is_shared=head_is_shared,
        kept_products_nbytes=kept_products_nbytes(skeleton),
        kv_shapes=run.kv_shapes,
    )
