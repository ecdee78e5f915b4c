"""Kernels in place of chains of small tensor operations, by kind; each kind can be switched off by its name.

A kind replaces what it recognises by its behaviour, in any family, and leaves the rest as it is. At run time what a
kernel does not take (many tokens, gradients, masks, other layouts) goes the way that it would go without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from transformers import PreTrainedModel

from offload.hf.fused.attention_interface import fuse_attention
from offload.hf.fused.decoder import fuse_decoders
from offload.hf.fused.kv_cache import fuse_kv_cache
from offload.hf.fused.linear import fuse_linears
from offload.hf.fused.rms_norm import fuse_rms_norms
from offload.hf.fused.rotary import fuse_rotary
from offload.hf.fused.stack import ExpertsAtHand

_FUSE: dict[str, Callable[[PreTrainedModel], int]] = {
    "linear": fuse_linears,
    "rms_norm": fuse_rms_norms,
    "rotary": fuse_rotary,
    "attention": fuse_attention,
    "kv_cache": fuse_kv_cache,
}


DECODER = "decoder"


def fuse(model: PreTrainedModel, kinds: Iterable[str], experts: ExpertsAtHand | None = None) -> dict[str, int]:
    """Let the kernels of some kinds compute what they recognise in a model; parameters keep their names and places.

    Args:
        model: with its weights.
        kinds: names of `offload.request.FUSED_KINDS`.
        experts: the runtime, whose experts a decoder's tape computes while all are in memory.

    Returns:
        How many modules each kind computes; for the cache, how many models.
    """
    wanted = set(kinds)
    counts = {kind: function(model) for kind, function in _FUSE.items() if kind in wanted}
    if DECODER in wanted:
        # A tape has the bits of all the other kinds: without one of them it would not equal the layer's own code.
        counts[DECODER] = fuse_decoders(model, experts) if wanted >= _FUSE.keys() else 0
    return counts
