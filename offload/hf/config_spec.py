"""The planner's record of a model from its config alone: every shape, no weights and no headers."""

from __future__ import annotations

import copy

import torch
from transformers import PretrainedConfig, PreTrainedModel

from offload.checkpoint.moe_modules import refuse_foreign_experts
from offload.checkpoint.quantised import take_encoding
from offload.hf.experts_interface import experts_modules
from offload.hf.model_source import expert_group
from offload.hf.quantise import linears_to_quantise
from offload.hf.skeleton import make_skeleton
from offload.hf.spec import build_spec
from offload.quantisation import Quantisation
from placement.model_spec import ModelSpec


def spec_of_config(
    config: PretrainedConfig, name: str, quantisation: Quantisation, *, dtype: torch.dtype, context_tokens: int
) -> ModelSpec:
    """What `build_spec` makes of a checkpoint of this config.

    Weights are taken as stored one tensor each and in the dtype that the model computes in.

    Args:
        config: of the model.
        name: what the user calls it.
        quantisation: packed formats.
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
    groups = [expert_group(path, module, quantisation.experts) for path, module in experts_modules(skeleton)]
    formats = linears_to_quantise(skeleton, quantisation)
    return build_spec(
        skeleton, groups, name=name, context_tokens=context_tokens, casts=False, formats=formats, alone=[*formats],
        quantisation=quantisation,
        decoding_nbytes=_decoding_nbytes(skeleton) if encoding is not None and encoding.method == "fp8" else 0,
    )  # fmt: skip


def _decoding_nbytes(skeleton: PreTrainedModel) -> int:
    """As `decoded.decoding_nbytes`, all linear layers but the output layer being fp8; scales are next to nothing."""
    head = skeleton.get_output_embeddings()
    linears = [one for one in skeleton.modules() if isinstance(one, torch.nn.Linear) and one is not head]
    return max((5 * linear.weight.numel() for linear in linears), default=0)
