"""Layers of a model that are alike: what one of them does on meta tensors, the others do too."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

_PLAIN = (bool, int, float, str, type(None))
_OF_THE_PLACE = "layer_idx"
_LISTS = ("layers", "h", "blocks")
"""What families call the list of their decoder's layers."""


def alike_layers(skeleton: PreTrainedModel) -> dict[str, list[str]]:
    """Paths of the decoder's layers, under the first of those that differ in nothing but their place.

    Empty where the decoder's layers cannot be told from other modules.
    """
    found = decoder_layers(skeleton)
    types = getattr(skeleton.config.get_text_config(), "layer_types", None)
    first: dict[Hashable, str] = {}
    alike: dict[str, list[str]] = {}
    for index, (name, layer) in enumerate(found):
        kind = (types[index] if types else None, _kind(layer))
        alike.setdefault(first.setdefault(kind, name), []).append(name)
    return alike


def decoder_layers(skeleton: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """The decoder's layers in order, by path; none where they cannot be told from other modules."""
    count = skeleton.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in skeleton.named_modules()
        if isinstance(module, torch.nn.ModuleList) and name.rpartition(".")[2] in _LISTS and len(module) == count
    ]
    if len(lists) != 1:
        return []
    path, layers = lists[0]
    return [(f"{path}.{index}", layer) for index, layer in enumerate(layers)]


def _kind(layer: torch.nn.Module) -> Hashable:
    """Classes, settings and shapes of a layer and all that is in it."""
    return tuple(
        (
            name,
            type(module),
            tuple(
                (key, value)
                for key, value in vars(module).items()
                if isinstance(value, _PLAIN) and key != _OF_THE_PLACE
            ),
            tuple((key, tensor.shape, tensor.dtype) for key, tensor in module.named_parameters(recurse=False)),
            tuple((key, tensor.shape, tensor.dtype) for key, tensor in module.named_buffers(recurse=False)),
        )
        for name, module in layer.named_modules()
    )


@contextmanager
def one_of_each_kind(skeleton: PreTrainedModel, alike: dict[str, list[str]]) -> Iterator[None]:
    """Within the block a layer returns what the first of its kind returned, without computing."""
    answers: dict[str, Any] = {}
    hooked: list[torch.nn.Module] = []

    def keep(first: str, forward: Any) -> Any:
        def kept(*args: Any, **kwargs: Any) -> Any:
            answers[first] = forward(*args, **kwargs)
            return answers[first]

        return kept

    def answer(first: str) -> Any:
        return lambda *_args, **_kwargs: answers[first]

    try:
        for first, names in alike.items():
            for name in names:
                layer = skeleton.get_submodule(name)
                # On the instance, before whatever the class does around its forward.
                layer.forward = keep(first, layer.forward) if name == first else answer(first)
                hooked.append(layer)
        yield
    finally:
        for layer in hooked:
            del layer.forward
