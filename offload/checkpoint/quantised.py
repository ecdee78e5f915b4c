"""Recognising quantised checkpoints: those that are decoded, and those that are refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from formats.packed import PACKED_FORMATS
from offload.errors import CheckpointError, UnsupportedModelError

_ATTRIBUTE = "quantization_config"

_SUFFIX_METHODS = {
    ".weight_scale_inv": "block FP8",
    "_blocks": "MXFP4",
    "_scales": "MXFP4",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".absmax": "bitsandbytes",
}


@dataclass(frozen=True)
class Encoding:
    """How the weights of a checkpoint are quantised, of the ways that are decoded.

    Attributes:
        method: "mxfp4", or "fp8" for e4m3 with a scale for each block.
        block: (rows, columns) that share a scale.
    """

    method: str
    block: tuple[int, int]

    @property
    def packed_format(self) -> str | None:
        """The packed format that keeps its values; None where none has such blocks."""
        if self.method == "mxfp4":
            return "mxfp4"
        fp8 = PACKED_FORMATS["fp8_e4m3"]
        return fp8.name if self.block == (fp8.group_rows, fp8.group) else None


def take_encoding(config: PretrainedConfig, where: str) -> Encoding | None:
    """What a config says of the checkpoint's weights, which it no longer says then; None: they are not quantised.

    Args:
        config: as config.json has it; that of the unquantised model from now on.
        where: names it in errors.

    Raises:
        UnsupportedModelError: another method, named.
        CheckpointError: fields that the method cannot have.
    """
    for owner in _owners(config):
        quantisation = getattr(owner, _ATTRIBUTE, None)
        if quantisation:
            found = _encoding(quantisation if isinstance(quantisation, dict) else vars(quantisation), where)
            drop_quantisation(config)
            return found
    return None


def drop_quantisation(config: PretrainedConfig) -> None:
    """Make a config that of the unquantised model, in place: decoded weights need no modules of transformers'."""
    for owner in _owners(config):
        vars(owner).pop(_ATTRIBUTE, None)


def refuse_quantised_keys(keys: Iterable[str]) -> None:
    """Raise UnsupportedModelError if one of these keys, none of them a parameter of the model, belongs to a method."""
    for key in keys:
        for suffix, method in _SUFFIX_METHODS.items():
            if key.endswith(suffix):
                raise _refusal(method, f"tensor {key!r}, and no {_ATTRIBUTE} of that kind in config.json")


def _owners(config: PretrainedConfig) -> list[PretrainedConfig]:
    return [config, config.get_text_config()]


def _encoding(fields: dict[str, Any], where: str) -> Encoding:
    named = fields.get("quant_method", "an unnamed method")
    method = str(getattr(named, "value", named))
    evidence = f"{_ATTRIBUTE} in {where}"
    if method == "mxfp4":
        return Encoding("mxfp4", (1, 32))
    if method != "fp8":
        raise _refusal(method, evidence)
    block = fields.get("weight_block_size")
    if block is None:
        raise _refusal("fp8 with one scale for each tensor", evidence)
    if "e4m3" not in str(fields.get("fmt") or "e4m3"):
        raise _refusal(f"fp8 in {fields['fmt']}", evidence)
    if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise CheckpointError(
            f"{where}: expected weight_block_size as two positive integers, found {block!r}. Fix: download config.json "
            "again."
        )
    return Encoding("fp8", (block[0], block[1]))


def _refusal(method: str, evidence: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "expected weights in bf16, fp16, fp32, MXFP4 (quant_method mxfp4) or e4m3 with a scale for each block "
        f"(quant_method fp8), found a checkpoint quantised with {method} ({evidence}). Fix: use the unquantised "
        "checkpoint of this model; the runtime quantises it itself if asked."
    )
