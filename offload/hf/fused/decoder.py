"""Decoder layers of one new token, all of them in few calls, bit by bit what the kernels do one by one.

Calls of modules, views and checks take longer than the kernels that they surround. So the decoder's forward is one pass
(`decoder_pass.py`) where that is all it does; where it is not, the first layer's forward runs the whole stack
(`stack.py`), and the other layers hand its result on. That this is what the model does with its layers is proven by
running its own code on stand-ins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from offload.hf.fused.causal_pass import fuse_causal
from offload.hf.fused.decoder_parts import DecoderParts, dtype_of, find_parts, norm_of
from offload.hf.fused.decoder_pass import find_pass
from offload.hf.fused.moe_parts import find_moe_parts
from offload.hf.fused.stack import ExpertsAtHand, Stack
from offload.hf.fused.stand_ins import Given, with_children
from offload.hf.fused.swap import STACK, Fused, swap


def fuse_decoders(model: PreTrainedModel, experts: ExpertsAtHand | None) -> int:
    """The decoder layers of a model, if all are of the forms that tapes know; returns how many.

    Call after all other kinds.
    """
    decoder = model.get_decoder()
    layers, angles = _layers(decoder), _angle_width(decoder)
    if not layers or angles is None or not _hands_on(decoder, layers):
        return 0
    parts = [found for layer in layers if (found := find_parts(layer, angles)) is not None]
    if len(parts) < len(layers) or len({_sizes(found) for found in parts}) > 1 or dtype_of(parts[0]) is None:
        return 0
    last = norm_of(decoder.get_submodule("norm"))
    stack = Stack(parts, [find_moe_parts(found.mlp) for found in parts], experts, last)
    stack.watch(decoder)
    whole = None if last is None else find_pass(decoder, layers, stack)
    for index, layer in enumerate(layers):
        swap(layer, _forward)
        layer.__dict__[STACK] = stack, index
    if whole is not None:
        swap(decoder, _whole_forward)
        decoder.__dict__[STACK] = whole
        fuse_causal(model, whole, stack)
    return len(layers)


def write_tape(model: PreTrainedModel) -> None:
    """Write the tape of one sequence for this thread now, which compiles what it runs; nothing where there is none."""
    for layer in _layers(model.get_decoder())[:1]:
        stack = layer.__dict__.get(STACK, (None, 0))[0]
        if stack is not None:
            stack.write_tape()


def _layers(decoder: nn.Module) -> list[nn.Module]:
    layers = getattr(decoder, "layers", None)
    return list(layers) if isinstance(layers, nn.ModuleList) else []


def _sizes(parts: DecoderParts) -> tuple[object, ...]:
    return (
        parts.heads, parts.kv_heads, parts.width, parts.before.module.get_parameter("weight").shape, dtype_of(parts),
    )  # fmt: skip


def _angle_width(decoder: nn.Module) -> int | None:
    """Width of the cosines that all layers share; None where the model has no such module."""
    embedding = getattr(decoder, "rotary_emb", None)
    if not isinstance(embedding, nn.Module):
        return None
    try:
        with torch.no_grad():
            cos, _ = embedding(torch.zeros(1, 1, 8, device="cpu"), torch.zeros(1, 1, dtype=torch.int64, device="cpu"))
    except Exception:  # noqa: BLE001 - an embedding that is called in another way
        return None
    return int(cos.shape[-1]) if isinstance(cos, torch.Tensor) and cos.dim() == 3 else None


def _hands_on(decoder: nn.Module, layers: Sequence[nn.Module]) -> bool:
    """Whether the model gives each layer's output to the next as it is, and all of them the same beside."""
    weight = next(layers[0].parameters(), None)
    if weight is None:
        return False
    width = getattr(decoder.config, "hidden_size", 0)
    outputs = [torch.randn(1, 1, width, device="cpu").to(weight.dtype) for _ in range(len(layers) + 1)]
    given = [Given(output) for output in outputs[1:]]
    stand_in = with_children(decoder, {"layers": nn.ModuleList(given)})
    cache = DynamicCache()
    try:
        with torch.no_grad():
            found = stand_in(inputs_embeds=outputs[0], past_key_values=cache, use_cache=True)
            expected = decoder.get_submodule("norm")(outputs[-1])
    except Exception:  # noqa: BLE001 - whatever a model of another form raises
        return False
    calls = [call for stub in given for call in stub.calls]
    if len(calls) != len(layers) or not torch.equal(found.last_hidden_state, expected):
        return False
    passed = calls[0][1]
    return all(
        len(args) == 1
        and args[0] is before
        and kwargs.keys() == passed.keys()
        and all(kwargs[name] is passed[name] for name in passed)
        for before, (args, kwargs) in zip(outputs, calls, strict=False)
    )


def _forward(self: Fused, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    stack, index = self.__dict__.get(STACK, (None, 0))
    if stack is not None and not args:
        if index:
            if stack.has_done(hidden_states):
                return hidden_states
        else:
            done = stack.run(hidden_states, kwargs)
            if done is not None:
                return done
    return self.plain.forward(self, hidden_states, *args, **kwargs)


def _whole_forward(self: Fused, *args: Any, **kwargs: Any) -> Any:
    whole = self.__dict__.get(STACK)
    done = None if whole is None else whole.run(args, kwargs)
    return self.plain.forward(self, *args, **kwargs) if done is None else done
