"""A language model's whole forward for one new token of each sequence: its decoder's pass, and the output layer.

Around its decoder a model's own forward looks at options, calls two modules and fills an output of many fields, which
takes as long as everything else that is left of a pass in Python. That it is this form is proven by running its own
code on stand-ins. The model keeps its class: what runs instead hangs on the instance.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from offload.hf.fused.conditions import is_weight
from offload.hf.fused.decoder_parts import is_linear
from offload.hf.fused.decoder_pass import DecoderPass
from offload.hf.fused.stack import Stack, Until
from offload.hf.fused.stand_ins import Given, with_children
from offload.hf.fused.watch import Watch
from offload.hf.quantised_linear import QuantisedLinear

_LARGE = 100.0
"""Logits that show whether something clips or scales them."""


class CausalPass:
    """The forward of one model with an output layer."""

    def __init__(
        self, model: PreTrainedModel, head: nn.Module, whole: DecoderPass, dtype: torch.dtype, output: Output
    ) -> None:
        """Make it.

        Args:
            model: the model.
            head: its output layer.
            whole: its decoder's pass, whose tapes compute the output layer too.
            dtype: of hidden states and logits.
            output: what the model's forward returns.
        """
        self._whole, self._output = whole, output
        self._head, self._rows = head, int(head.out_features)  # type: ignore[arg-type]  # a linear layer's
        self._dtype = dtype
        self._watch = Watch((model.get_decoder(), head))
        self._watch.also_children_of((model,))

    def run(self, args: tuple[Any, ...], passed: dict[str, Any]) -> Any:
        """The output for one new token of each sequence; None where the model's own code must run.

        The first of the model's arguments, its tokens, may come without a name.
        """
        if len(args) == 1 and "input_ids" not in passed:
            passed["input_ids"], args = args[0], ()
        keep = passed.pop("logits_to_keep", 0) if "logits_to_keep" in passed else 0
        weight = self._head._parameters.get("weight")
        if (
            args
            or type(keep) is not int
            or keep < 0
            or (weight is not None and weight.requires_grad and torch.is_grad_enabled())
            or not self._watch.finds_nothing()
        ):
            return None
        begun = self._whole.begin(passed)
        if begun is None:
            return None
        logits = torch.empty(len(begun.tokens), 1, self._rows, dtype=self._dtype, device="cpu")
        self._whole.play(begun, Until.LOGITS, logits)
        return self._output.of(logits, begun.cache)


class Output:
    """Makes a model's outputs of logits and a cache, without what a constructor looks at each time."""

    def __init__(self, example: Any) -> None:
        """Make more like this one.

        Args:
            example: a `ModelOutput` of transformers, with logits and cache only.
        """
        self._type: type[Any] = type(example)
        self._fields = dict.fromkeys(vars(example))

    def of(self, logits: torch.Tensor, cache: Any) -> Any:
        """An output of them."""
        output: Any = OrderedDict.__new__(self._type)
        fields = vars(output)
        fields.update(self._fields)
        fields["logits"], fields["past_key_values"] = logits, cache
        OrderedDict.__setitem__(output, "logits", logits)
        OrderedDict.__setitem__(output, "past_key_values", cache)
        return output

    def is_like(self, example: Any) -> bool:
        """Whether the constructor gives the same."""
        found = self.of(example.logits, example.past_key_values)
        pairs = zip(vars(found).items(), vars(example).items(), strict=False)
        return (
            type(found) is type(example)
            and [*found.keys()] == [*example.keys()] == ["logits", "past_key_values"]
            and len(vars(found)) == len(vars(example))
            and all(name == other and value is expected for (name, value), (other, expected) in pairs)
            and found.to_tuple() == (example.logits, example.past_key_values)
        )


class CausalForward:
    """What hangs on a model as its `forward`: a pass where it can run. A copy of the model has its class's own."""

    def __init__(self, model: PreTrainedModel, whole: CausalPass) -> None:
        self._model, self._pass = model, whole
        # By which `inspect.signature` sees the model's own arguments.
        self.__wrapped__ = _own_forward(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the forward of the model's class."""
        # A compiler that traces this is told to trace the model's own code.
        done = None if torch.compiler.is_compiling() else self._pass.run(args, kwargs.copy())
        return self.__wrapped__(*args, **kwargs) if done is None else done

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[PreTrainedModel]]:
        return _own_forward, (self._model,)


def _own_forward(model: PreTrainedModel) -> MethodType:
    return MethodType(type(model).forward, model)


def fuse_causal(model: PreTrainedModel, whole: DecoderPass, stack: Stack) -> None:
    """Let the whole model be one pass, if all that its forward does beside the decoder's is the output layer.

    Args:
        model: whose decoder has a pass.
        whole: that pass.
        stack: its layers.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    names = {id(child): name for name, child in model.named_children()}
    if (
        "forward" in model.__dict__
        or next(iter(inspect.signature(model.forward).parameters)) != "input_ids"
        or model.config is not decoder.config
        or not isinstance(head, nn.Module)
        or set(names) != {id(decoder), id(head)}
        or not is_linear(head)
        or not _has_weights_for(head, stack.dtype)
    ):
        return
    output = _output_of(model, names[id(decoder)], names[id(head)], whole.output)
    if output is not None and stack.dtype is not None:
        stack.end_with(head)
        forward = CausalForward(model, CausalPass(model, head, whole, stack.dtype, output))
        model.forward = forward


def _has_weights_for(head: nn.Module, dtype: torch.dtype | None) -> bool:
    """Whether kernels take the layer's weights beside hidden states of a dtype."""
    if isinstance(head, QuantisedLinear):
        return True
    like, bias = torch.empty(0, dtype=dtype, device="cpu"), head._parameters.get("bias")
    with torch.no_grad():
        return is_weight(head._parameters.get("weight"), like) and (bias is None or is_weight(bias, like))


def _output_of(model: PreTrainedModel, decoder: str, head: str, hidden_output: type[Any]) -> Output | None:
    """What the forward returns if it is the output layer of the decoder's hidden state."""
    weight, layer = next(model.get_decoder().parameters()), model.get_output_embeddings()
    sizes: tuple[int, int] = model.config.hidden_size, layer.out_features
    hidden, logits = (_LARGE * torch.randn(1, 1, size, device="cpu").to(weight.dtype) for size in sizes)
    ids, cache = torch.ones(1, 1, dtype=torch.int64, device="cpu"), DynamicCache()
    beside: dict[str, Any] = {
        "attention_mask": torch.ones(1, 6, dtype=torch.int64),
        "position_ids": torch.full((1, 1), 5),
    }
    output: Output | None = None
    try:
        with torch.no_grad():
            for more in ({}, beside, *({"logits_to_keep": count, **beside} for count in (0, 1, 2))):
                below = Given(hidden_output(last_hidden_state=hidden, past_key_values=cache))
                above = Given(logits)
                passed: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True, **more}
                # Not a call: its hooks count passes.
                found = type(model).forward(with_children(model, {decoder: below, head: above}), **passed)
                passed.pop("logits_to_keep", None)
                ((args, given),), ((above_args, above_given),) = below.calls, above.calls
                if (
                    args
                    or any(given.get(name) is not value for name, value in passed.items())
                    or any(value not in (None, False) for name, value in given.items() if name not in passed)
                    or above_given
                    or len(above_args) != 1
                    or not torch.equal(above_args[0], hidden)
                    or found.logits is not logits
                    or found.past_key_values is not cache
                ):
                    return None
                output = Output(found)
                if not output.is_like(found):
                    return None
    except Exception:  # noqa: BLE001 - whatever a model of another form raises
        return None
    return output
