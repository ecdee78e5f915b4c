"""Models without weights: what a config alone says of sizes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from offload.errors import CheckpointError, UnsupportedModelError

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")


def read_config(directory: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The checkpoint's config.

    Raises:
        CheckpointError: config.json is missing or not a config.
        UnsupportedModelError: an architecture that the installed transformers does not have.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if "does not recognize this architecture" in str(error):
            raise UnsupportedModelError(
                f"{directory / 'config.json'}: {_first_sentence(error)} Fix: a version of transformers that has it "
                f"(this one is {transformers.__version__}), or a model that is supported"
            ) from error
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(f"{directory}: {error}") from error
        raise CheckpointError(
            f"{directory / 'config.json'} is not a config that transformers can read: {error}"
        ) from error
    except StrictDataclassError as error:
        raise CheckpointError(
            f"{directory / 'config.json'} is not a config that transformers can read: {' '.join(str(error).split())}"
        ) from error
    return config


def config_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The dtype that a config names, None where it names none."""
    named = config.dtype
    return getattr(torch, named, None) if isinstance(named, str) else named


def make_skeleton(config: PretrainedConfig, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The model on the meta device: every module and shape, no memory.

    Args:
        config: of the checkpoint; not changed.
        dtype: in which the model computes.
        **options: passed to `AutoModelForCausalLM.from_config`, such as attn_implementation.

    Raises:
        UnsupportedModelError: no causal language model for this config, or one whose config does not name its sizes.
    """
    try:
        with torch.device("meta"):
            # from_config keeps the object that it is given, and the skeleton's dispatch is set on it.
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, **options)
    except ValueError as error:
        raise UnsupportedModelError(
            f"transformers has no causal language model for {config.model_type!r}: {_first_sentence(error)}"
        ) from error
    except (ArithmeticError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise UnsupportedModelError(
            f"transformers makes no model of this config (model_type {config.model_type!r}): {type(error).__name__}: "
            f"{error}. Fix: check its sizes"
        ) from error
    _check_sizes(model)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _first_sentence(error: Exception) -> str:
    """Of a message of transformers, which goes on with lists and advice."""
    return str(error).strip().partition("\n")[0].split(". ")[0].rstrip(".") + "."


def _check_sizes(model: PreTrainedModel) -> None:
    try:
        text = model.config.get_text_config()
    except ValueError as error:
        raise UnsupportedModelError(f"{type(model).__name__}: {error}") from error
    missing = [name for name in _SIZES if not isinstance(getattr(text, name, None), int)]
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type {model.config.model_type!r}): expected a config with "
            f"{', '.join(_SIZES)}, found none of {', '.join(missing)}. Fix: load this model with transformers."
        )
