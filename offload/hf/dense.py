"""Dense weights: everything that is not a routed expert, loaded once through transformers' own loader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from offload.errors import CheckpointError


def load_dense(skeleton: PreTrainedModel, tensors: Mapping[str, Any], dtype: torch.dtype, source: str) -> None:
    """Fill the skeleton in place: renaming, merging, tying and buffers as `from_pretrained` does them.

    Args:
        skeleton: on meta, its experts modules without parameters.
        tensors: checkpoint key → lazy tensor, read when it is indexed with `[...]`.
        dtype: in which the model computes.
        source: names the checkpoint in messages.

    Raises:
        CheckpointError: weights are missing, of another shape or fail to convert.
    """
    load_config = LoadStateDictConfig(
        pretrained_model_name_or_path=source,
        dtype=dtype,
        dtype_plan=skeleton._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(skeleton),  # type: ignore[arg-type]
    )
    cls = type(skeleton)
    with _without_bars():
        info, _ = cls._load_pretrained_model(skeleton, dict(tensors), None, load_config)
    missing = sorted(info.missing_keys - set(skeleton.all_tied_weights_keys))
    if missing:
        raise CheckpointError(f"{source} lacks weights that {cls.__name__} needs: {_some(missing)}")
    wrong = [str(problem) for problem in (*info.mismatched_keys, *info.conversion_errors.items(), *info.error_msgs)]
    if wrong:
        raise CheckpointError(f"{source} has weights that {cls.__name__} cannot take: {_some(wrong)}")
    cls._finalize_model_loading(skeleton, load_config, info)
    skeleton.eval().requires_grad_(False)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Transformers' own bar counts weights of which most are not loaded; the caller shows bytes."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
