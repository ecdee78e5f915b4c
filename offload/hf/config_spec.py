"""The planner's record of a model from its config alone: every shape, no weights and no headers."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from offload.errors import UnsupportedModelError
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
        UnsupportedModelError: not a causal language model with experts that can be offloaded.
    """
    skeleton = make_skeleton(config, dtype)
    groups = [expert_group(path, module, quantisation.experts) for path, module in experts_modules(skeleton)]
    if not groups:
        raise UnsupportedModelError(
            f"{name}: {type(skeleton).__name__} has no routed experts that transformers' experts interface dispatches"
        )
    formats = linears_to_quantise(skeleton, quantisation)
    return build_spec(
        skeleton, groups, name=name, context_tokens=context_tokens, casts=False, formats=formats, alone=[*formats],
        quantisation=quantisation,
    )  # fmt: skip
