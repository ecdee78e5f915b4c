"""Recognising checkpoints whose weights are quantised, to refuse them by name."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PretrainedConfig

from offload.errors import UnsupportedModelError

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


def refuse_quantised_config(config: PretrainedConfig) -> None:
    """Raise UnsupportedModelError if the config says that the checkpoint is quantised."""
    for owner in (config, config.get_text_config()):
        quantisation = getattr(owner, "quantization_config", None)
        if quantisation:
            fields = quantisation if isinstance(quantisation, dict) else vars(quantisation)
            raise _refusal(str(fields.get("quant_method", "an unnamed method")), "quantization_config in config.json")


def refuse_quantised_keys(keys: Iterable[str]) -> None:
    """Raise UnsupportedModelError if one of these keys, none of them a parameter of the model, belongs to a method."""
    for key in keys:
        for suffix, method in _SUFFIX_METHODS.items():
            if key.endswith(suffix):
                raise _refusal(method, f"tensor {key!r}")


def _refusal(method: str, evidence: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"expected weights in bf16, fp16 or fp32, found a checkpoint quantised with {method} ({evidence}). Fix: use "
        "the unquantised checkpoint of this model; the runtime quantises it itself if asked."
    )
