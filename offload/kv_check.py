"""Whether a model's KV cache can be what was asked for."""

from __future__ import annotations

import warnings
from dataclasses import replace

from offload.errors import InvalidArgumentError, SlowKvWarning
from offload.sizes import format_size
from placement.kv import (
    KV_CHOICES,
    KvChoice,
    KvShape,
    block_nbytes,
    largest_block_nbytes,
    layout_format,
    minimum_nbytes,
)
from placement.model_spec import ModelSpec


def check_kv(spec: ModelSpec, choice: KvChoice, batch: int) -> None:
    """Refuse a KV cache that cannot be, before a plan is made with it.

    Args:
        spec: of the model.
        choice: what the user wants.
        batch: sequences at once.

    Raises:
        InvalidArgumentError: the format has no blocks for the keys and values of some layer, `kv_ram` is too small for
            any context, or `kv_vram` for a block.

    Warns:
        SlowKvWarning: the model has no layer that what was asked for could change.
    """
    shapes = [shape for shape in spec.kv_shapes if shape is not None]
    if not shapes:
        if replace(choice, vram_nbytes=choice.vram_nbytes or 0) != KvChoice():
            warnings.warn(
                f"{spec.name}: no layer keeps keys and values of all tokens, so that kv=, kv_ram=, kv_vram= and "
                "kv_sparsity= change nothing",
                SlowKvWarning,
                stacklevel=2,
            )
        return
    format = layout_format(choice.format, spec.dtype)
    for index, shape in enumerate(spec.kv_shapes):
        refused = None if shape is None else _refusal(shape, format)
        if shape is not None and refused is not None:
            makeable = [
                one
                for one in KV_CHOICES
                if all(_refusal(other, layout_format(one, spec.dtype)) is None for other in shapes)
            ]
            raise InvalidArgumentError(
                f'kv="{choice.format}": layer {index} of {spec.name} keeps {_in_words(shape)}, of which there are no '
                f"blocks of {format}: {refused}. Fix: a format that has them: {', '.join(makeable) or 'there is none'}"
            )
    least = minimum_nbytes(spec, batch, format, above=choice.vram_nbytes != 0)
    if choice.ram_nbytes is not None and choice.ram_nbytes < least:
        raise InvalidArgumentError(
            f"kv_ram={choice.ram_nbytes}: the blocks that {batch} sequences write to, and two segments to read "
            f"into, take {least:,} bytes ({format_size(least)}); give as much or more"
        )
    block = largest_block_nbytes(spec, format)
    if choice.vram_nbytes is not None and 0 < choice.vram_nbytes < block:
        raise InvalidArgumentError(
            f"kv_vram={choice.vram_nbytes}: a block of the KV cache takes {block:,} bytes; give as much or more, or 0"
        )


def _refusal(shape: KvShape, format: str) -> str | None:
    """Why there are no blocks of a format; None where there are."""
    try:
        block_nbytes(shape, format)
    except ValueError as error:
        return str(error)
    return None


def _in_words(shape: KvShape) -> str:
    if shape.value_from_key:
        return f"latents of {shape.key_width} channels, of which values are the first {shape.value_from_key}"
    return f"{shape.heads} heads of keys of {shape.key_width} channels and values of {shape.value_width}"
