"""The planner's record of a model from its config alone: every shape, no weights and no headers."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from transformers import PretrainedConfig, PreTrainedModel

from offload.checkpoint.moe_modules import refuse_foreign_experts
from offload.checkpoint.quantised import take_encoding
from offload.hf.experts_interface import experts_modules
from offload.hf.model_source import expert_group
from offload.hf.quantise import linears_to_quantise
from offload.hf.skeleton import make_skeleton
from offload.hf.spec import build_spec, measure_without_experts
from offload.quantisation import Quantisation
from placement.model_spec import ModelSpec


def spec_of_config(
    config: PretrainedConfig, name: str, quantisation: Quantisation, *, dtype: torch.dtype, context_tokens: int
) -> ModelSpec:
    """As `specs_of_config`, in one format."""
    (spec,) = specs_of_config(config, name, (quantisation,), dtype=dtype, context_tokens=context_tokens)
    return spec


def specs_of_config(
    config: PretrainedConfig,
    name: str,
    quantisations: Iterable[Quantisation],
    *,
    dtype: torch.dtype,
    context_tokens: int,
) -> tuple[ModelSpec, ...]:
    """What `build_spec` makes of a checkpoint of this config, in each of some formats.

    Weights are taken as stored one tensor each and in the dtype that the model computes in.

    Args:
        config: of the model.
        name: what the user calls it.
        quantisations: packed formats.
        dtype: in which it computes.
        context_tokens: longest sequence.

    Raises:
        UnsupportedModelError: not a causal language model, experts that cannot be offloaded, or weights that are
            quantised in a way that is not decoded.
    """
    config = copy.deepcopy(config)
    encoding = take_encoding(config, f"config.json of {name}")
    skeleton = make_skeleton(config, dtype)
    refuse_foreign_experts(skeleton)
    choices = [
        (
            one,
            [expert_group(path, module, one.experts) for path, module in experts_modules(skeleton)],
            linears_to_quantise(skeleton, one),
        )
        for one in quantisations
    ]
    run = measure_without_experts(skeleton)
    decoding_nbytes = _decoding_nbytes(skeleton) if encoding is not None and encoding.method == "fp8" else 0
    return tuple(
        build_spec(
            skeleton, groups, run, name=name, context_tokens=context_tokens, casts=False, formats=formats,
            alone=[*formats], quantisation=one, decoding_nbytes=decoding_nbytes,
        )
        for one, groups, formats in choices
    )  # fmt: skip


def _decoding_nbytes(skeleton: PreTrainedModel) -> int:
    """As `decoded.decoding_nbytes`, all linear layers but the output layer being fp8; scales are next to nothing."""
    head = skeleton.get_output_embeddings()
    linears = [one for one in skeleton.modules() if isinstance(one, torch.nn.Linear) and one is not head]
    return max((5 * linear.weight.numel() for linear in linears), default=0)
