"""Decoder layers that cost the same, so that a model of many layers is computed with as few."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import lru_cache

from placement.model_spec import ExpertsSpec, LayerSpec, ModelSpec


@dataclass(frozen=True)
class LayerKind:
    """Layers that differ in nothing but their place.

    Attributes:
        layer: the first of them.
        experts: its routed experts, None for a dense layer.
        indices: of all of them, ascending.
    """

    layer: LayerSpec
    experts: ExpertsSpec | None
    indices: tuple[int, ...]


@lru_cache(maxsize=64)
def layer_kinds(spec: ModelSpec) -> tuple[LayerKind, ...]:
    """The kinds of a model's layers, by their first layer.

    Raises:
        ValueError: the spec has no layers.
    """
    if not spec.layers:
        raise ValueError(f"{spec.name}: the spec has sizes only, no layers to predict from")
    found: dict[Hashable, list[int]] = {}
    for index, layer in enumerate(spec.layers):
        experts = None if layer.experts is None else replace(spec.experts[layer.experts], module="")
        found.setdefault((replace(layer, experts=None), experts), []).append(index)
    return tuple(
        LayerKind(layer, None if layer.experts is None else spec.experts[layer.experts], tuple(indices))
        for indices in found.values()
        for layer in (spec.layers[indices[0]],)
    )
