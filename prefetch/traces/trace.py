"""A routing trace: which experts every token of a run went to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from prefetch.policies.geometry import Geometry

Ids = npt.NDArray[np.uint16]


class TraceError(ValueError):
    """A trace that contradicts itself, or bytes that are none."""


@dataclass(frozen=True)
class LayerStep:
    """What one MoE layer needed in one forward pass.

    Attributes:
        layer: the layer, counted over layers that have experts.
        experts: int64 [n], the experts that have tokens, ascending.
        loads: int64 [n], tokens of each.
        tokens: tokens of the pass.
        prefill: whether the pass had several tokens of a sequence.
        scores: fp16 [experts of the layer], the router's mean probabilities over the tokens; None where not recorded.
    """

    layer: int
    experts: npt.NDArray[np.int64]
    loads: npt.NDArray[np.int64]
    tokens: int
    prefill: bool
    scores: npt.NDArray[np.float16] | None

    @property
    def shares(self) -> list[float] | None:
        """What `CachePolicy.on_route` wants: shares of tokens at prefill, None at decode."""
        return (self.loads / self.tokens).tolist() if self.prefill else None


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Passes of a model, in order; each goes through all MoE layers in order.

    Attributes:
        name: what was run, such as a model and a text; says "synthetic" where no model was.
        geometry: experts by layer.
        top_k: experts of a token in each layer.
        pass_tokens: int32 [passes], tokens of each pass, all sequences together.
        pass_prefill: bool [passes], whether a pass had several tokens of a sequence.
        experts: uint16 [tokens of all passes, layers, top_k]; expert ids of a token in a layer, all different.
        scores: fp16 [passes, layers, largest layer], the router's mean probabilities over a pass's tokens, or None.
        ahead: fp16 [passes, layers, depth, largest layer], what the routers of the next 1 to depth layers say (logits)
            of the hidden state that the layer's own router saw, in passes of one token; 0 in others, beyond the last
            layer and beyond a layer's experts. None where not recorded.
    """

    name: str
    geometry: Geometry
    top_k: int
    pass_tokens: npt.NDArray[np.int32]
    pass_prefill: npt.NDArray[np.bool_]
    experts: Ids
    scores: npt.NDArray[np.float16] | None = None
    ahead: npt.NDArray[np.float16] | None = None

    def __post_init__(self) -> None:
        layers, widest = self.geometry.layers, max(self.geometry.counts)
        expected = (int(self.pass_tokens.sum()), layers, self.top_k)
        if self.experts.shape != expected or self.pass_prefill.shape != self.pass_tokens.shape:
            raise TraceError(f"experts of {self.experts.shape}, expected {expected}: tokens, layers, top_k")
        if len(self.pass_tokens) and self.pass_tokens.min() < 1:
            raise TraceError("a pass of no tokens")
        if np.any(self.experts >= np.array(self.geometry.counts)[None, :, None]):
            raise TraceError("an expert id is out of its layer's range")
        ordered = np.sort(self.experts, axis=-1)
        if np.any(ordered[..., 1:] == ordered[..., :-1]):
            raise TraceError("a token goes to one expert twice")
        if self.scores is not None and self.scores.shape != (len(self.pass_tokens), layers, widest):
            raise TraceError(f"scores of {self.scores.shape}, expected {(len(self.pass_tokens), layers, widest)}")
        if self.ahead is not None:
            whole = (len(self.pass_tokens), layers, self.depth, widest)
            if self.ahead.ndim != 4 or self.ahead.shape != whole or not self.depth:
                raise TraceError(f"logits ahead of {self.ahead.shape}, expected {whole}")

    @property
    def depth(self) -> int:
        """Layers that `ahead` reaches; 0 where it was not recorded."""
        return 0 if self.ahead is None or self.ahead.ndim < 3 else self.ahead.shape[2]

    @property
    def passes(self) -> int:
        """Forward passes."""
        return len(self.pass_tokens)

    @cached_property
    def pass_starts(self) -> npt.NDArray[np.int64]:
        """int64 [passes + 1]: the tokens of pass p are pass_starts[p] to pass_starts[p + 1]."""
        return np.concatenate([[0], np.cumsum(self.pass_tokens, dtype=np.int64)])

    def step(self, index: int, layer: int) -> LayerStep:
        """One layer of one pass."""
        tokens = self.experts[self.pass_starts[index] : self.pass_starts[index + 1], layer]
        experts, loads = np.unique(tokens, return_counts=True)
        scores = None if self.scores is None else self.scores[index, layer, : self.geometry.counts[layer]]
        return LayerStep(
            layer, experts.astype(np.int64), loads, int(self.pass_tokens[index]), bool(self.pass_prefill[index]), scores
        )

    def steps(self) -> Iterator[LayerStep]:
        """All layers of all passes, in the order of execution."""
        for index in range(self.passes):
            for layer in range(self.geometry.layers):
                yield self.step(index, layer)
