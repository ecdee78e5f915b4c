"""A decoder's whole forward for one new token of each sequence: embedding, layers, norm.

Around its layers a model's own forward makes masks, angles, a list of the layers and an output, and calls every layer,
which takes longer than all kernels of a small model. That it is this form is proven by running its own code on
stand-ins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from offload.hf.fused.angles import Angles
from offload.hf.fused.conditions import is_plain, returns_hidden_and_cache
from offload.hf.fused.kv_cache import GrowingLayer
from offload.hf.fused.stack import Stack, Until
from offload.hf.fused.stack_tape import StackTape
from offload.hf.fused.stand_ins import Given, with_children
from offload.hf.fused.swap import plain_class
from offload.hf.fused.tape_caches import TapeCache
from offload.hf.fused.watch import Watch

_PAST_TOKENS = 5


class Begun(NamedTuple):
    """A pass that may be played.

    Attributes:
        tokens: the new one of each sequence.
        cache: the user's.
        ready: see `Stack.ready`.
    """

    tokens: list[int]
    cache: Any
    ready: TapeCache


class DecoderPass:
    """The forward of one decoder.

    Attributes:
        output: what it returns.
    """

    def __init__(self, decoder: PreTrainedModel, stack: Stack, output: type[Any]) -> None:
        """Make it.

        Args:
            decoder: the model below its output layer.
            stack: its layers, with the norm after them.
            output: what its forward returns.
        """
        embedding = decoder.get_input_embeddings()
        rotary, norm = decoder.get_submodule("rotary_emb"), decoder.get_submodule("norm")
        weight = embedding.get_parameter("weight")
        self._stack = stack
        self._embedding = embedding
        # As long as the watch finds nothing they are there.
        self._address = weight.data_ptr()
        self._config: Any = decoder.config
        self._watch = Watch((embedding, rotary, norm))
        self._watch.also_children_of((decoder,))
        self._angles = Angles(rotary, weight.dtype)
        self.output = output

    def run(self, args: tuple[Any, ...], passed: dict[str, Any]) -> Any:
        """The output for one new token of each sequence; None where the model's own code must run."""
        begun = None if args else self.begin(passed)
        if begun is None:
            return None
        return self.output(last_hidden_state=self.play(begun, Until.NORM).last.clone(), past_key_values=begun.cache)

    def begin(self, passed: dict[str, Any]) -> Begun | None:
        """What `play` needs; None where the model's own code must run.

        Args:
            passed: what the forward is called with, by name.
        """
        ids, weight = passed.get("input_ids"), self._embedding._parameters.get("weight")
        if (
            type(ids) is not torch.Tensor
            or ids.dim() != 2
            or ids.shape[1] != 1
            or ids.dtype is not torch.int64
            or not is_plain(ids)
            or weight is None
            or (weight.requires_grad and torch.is_grad_enabled())
            or not returns_hidden_and_cache(self._config, passed)
            or not self._watch.finds_nothing()
        ):
            return None
        tokens = [token for (token,) in ids.tolist()]
        cache, count = passed.get("past_key_values"), weight.shape[0]
        # What the model's own code says of a token that is none is for it to say.
        if not all(0 <= token < count for token in tokens):
            return None
        ready = self._stack.ready(cache, len(tokens))
        if ready is None or not _sees_all(passed, len(tokens), ready.past):
            return None
        return Begun(tokens, cache, ready)

    def play(self, begun: Begun, until: Until, logits: torch.Tensor | None = None) -> StackTape:
        """The pass, up to `until`; see `Stack.decode`.

        Args:
            begun: by `begin`.
            until: what comes last.
            logits: what the output layer writes to, if it comes last; [batch, 1, vocabulary], contiguous.
        """
        angles = self._angles.at(begun.ready.past)

        def enter(tape: StackTape) -> None:
            tape.enter(self._address, begun.tokens, angles)
            if logits is not None:
                tape.write_logits_to(logits)

        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._stack.decode(begun.ready, enter, until)
        return self._stack.decode(begun.ready, enter, until)


def find_pass(decoder: PreTrainedModel, layers: Sequence[nn.Module], stack: Stack) -> DecoderPass | None:
    """The forward of a decoder whose layers are a stack; None where it does anything else.

    Args:
        decoder: the model below its output layer, with its weights, on the CPU.
        layers: its layers.
        stack: of them, with the norm after them.
    """
    embedding: Any = decoder.get_input_embeddings()
    if (
        plain_class(embedding) is not nn.Embedding
        or embedding.max_norm is not None
        or embedding.weight.dtype is not stack.dtype
        or type(embedding.weight) is not nn.Parameter
        or not embedding.weight.is_contiguous()
        or not all(isinstance(getattr(decoder, name, None), nn.Module) for name in ("rotary_emb", "norm"))
        or _looks_back_less(decoder.config)
    ):
        return None
    output = _output_of(decoder, layers)
    return None if output is None else DecoderPass(decoder, stack, output)


def _looks_back_less(config: Any) -> bool:
    """Whether a token does not see all that came before it, which shows only after many."""
    kinds = getattr(config, "layer_types", None) or ()
    return (
        getattr(config, "sliding_window", None) is not None
        or getattr(config, "attention_chunk_size", None) is not None
        or any(kind != "full_attention" for kind in kinds)
    )


def _sees_all(passed: dict[str, Any], batch: int, past: int) -> bool:
    """Whether the new token of each sequence comes right after `past` that all count."""
    mask, positions = passed.get("attention_mask"), passed.get("position_ids")
    if mask is not None and (
        type(mask) is not torch.Tensor or mask.shape != (batch, past + 1) or not is_plain(mask) or not bool(mask.all())
    ):
        return False
    return positions is None or (
        type(positions) is torch.Tensor
        and positions.shape in ((1, 1), (batch, 1))
        and all(position == past for position in positions.view(-1).tolist())
    )


def _output_of(decoder: PreTrainedModel, layers: Sequence[nn.Module]) -> type[Any] | None:
    """What the forward returns if it is embedding, layers, norm."""
    embedding, norm, rotary = (
        decoder.get_input_embeddings(),
        decoder.get_submodule("norm"),
        decoder.get_submodule("rotary_emb"),
    )
    ids = torch.ones(1, 1, dtype=torch.int64, device="cpu")
    positions = torch.full((1, 1), _PAST_TOKENS, device="cpu")
    mask = torch.ones(1, _PAST_TOKENS + 1, dtype=torch.int64, device="cpu")
    try:
        with torch.no_grad():
            embedded = embedding(ids)
            after = torch.flip(embedded, (-1,))
            cache = _cache_of(len(layers))
            expected, angles = norm(after), rotary(embedded, position_ids=positions)
            for more in ({}, {"attention_mask": mask, "position_ids": positions}):
                given = [Given(after) for _ in layers]
                stand_in = with_children(decoder, {"layers": nn.ModuleList(given)})
                found = stand_in(input_ids=ids, past_key_values=cache, use_cache=True, **more)
                (args, passed), *_ = given[0].calls
                if not (
                    torch.equal(args[0], embedded)
                    and passed.get("attention_mask") is None
                    and passed.get("past_key_values") is cache
                    and all(map(torch.equal, passed["position_embeddings"], angles))
                    and [*found.keys()] == ["last_hidden_state", "past_key_values"]
                    and found.past_key_values is cache
                    and torch.equal(found.last_hidden_state, expected)
                ):
                    return None
    except Exception:  # noqa: BLE001 - whatever a model of another form raises
        return None
    return type(found)


def _cache_of(layers: int) -> DynamicCache:
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    tokens = torch.zeros(1, 1, _PAST_TOKENS, 1, device="cpu")
    for index in range(layers):
        cache.update(tokens, tokens, index)
    return cache
