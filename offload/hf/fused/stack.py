"""Running a stack of decoder layers for one new token: layer after layer from the tape, Python only where it must.

While all experts of a MoE block are at hand, the tape computes it too, and consecutive layers are one call. Otherwise
the block's own code runs between two parts of the tape.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from cpu_kernels.linear import MOST_TOKENS
from cpu_kernels.threads import Pool
from offload.devices.host_threads import kernel_pool
from offload.hf.fused.attention import IMPLEMENTATION, TELLING
from offload.hf.fused.conditions import is_plain
from offload.hf.fused.decoder_parts import DecoderParts, dtype_of
from offload.hf.fused.kv_cache import GrowingLayer, Room
from offload.hf.fused.moe_parts import MoeParts
from offload.hf.fused.stack_tape import Addresses, StackTape, TapedMoe
from offload.hf.fused.watch import Watch
from offload.moe.layer import ExpertsLayer


class ExpertsAtHand(Protocol):
    """The runtime as a stack sees it.

    Attributes:
        lock: held while the tape uses experts.
        layers: by the order of their keys.
    """

    lock: threading.RLock
    layers: tuple[ExpertsLayer, ...]

    def addresses_of_all(self) -> Addresses | None:
        """Int64 [experts], where each expert's bundle lies; None unless all are here. Call with the lock."""
        ...

    def note_taped(self, keys: list[int]) -> None:
        """A tape has computed these experts of one layer."""
        ...


class Stack:
    """The layers of a model, all of one form and one size."""

    def __init__(
        self, layers: Sequence[DecoderParts], moe: Sequence[MoeParts | None], experts: ExpertsAtHand | None
    ) -> None:
        """Make a stack; tapes are written when they are first needed.

        Args:
            layers: the parts of each.
            moe: the parts of each one's MoE block; None where it has another form, or none.
            experts: where the experts come from; None: no block is taped.
        """
        self._layers = list(layers)
        self._moe = list(moe)
        self._experts = experts
        self._mlps = [parts.mlp for parts in layers]
        self._configs: list[Any] = [parts.attention.config for parts in layers]
        self._dtype = dtype_of(layers[0])
        self._hidden = len(layers[0].before.module.get_parameter("weight"))
        self._watch = Watch(module for parts in layers for module in parts.modules())
        self._moe_watch = Watch(module for parts in moe if parts is not None for module in parts.modules())
        self._local = threading.local()

    def watch(self, layers: Sequence[nn.Module]) -> None:
        """Hooks on the layers themselves must see each layer's output: the stack then leaves them alone."""
        self._watch.also_hooks_of(layers)

    def write_tape(self) -> None:
        """Write this thread's tape of one sequence ahead."""
        self._tape(1, None)

    def has_done(self, hidden: torch.Tensor) -> bool:
        """Whether a tensor is what this thread's last run returned: all layers are in it."""
        return self._local.__dict__.get("output") is hidden

    def run(self, hidden: torch.Tensor, passed: dict[str, Any]) -> torch.Tensor | None:
        """All layers, for one new token of each sequence.

        Args:
            hidden: [batch, 1, hidden], the first layer's input.
            passed: what every layer is given by name.

        Returns:
            [batch, 1, hidden]; None where the layers' own code must run, and nothing has changed.
        """
        stored = self._stored(hidden, passed)
        rooms = None if stored is None else self._rooms(stored, hidden)
        angles = passed.get("position_embeddings")
        if stored is None or rooms is None or not self._takes(angles, hidden):
            return None
        experts = self._experts
        if experts is None:
            tape = self._tape(hidden.shape[0], None)
            out = self._run(tape, hidden, angles, rooms, at_hand=False)
        else:
            with experts.lock:
                addresses = experts.addresses_of_all() if self._moe_watch.finds_nothing() else None
                tape = self._tape(hidden.shape[0], addresses)
                out = self._run(tape, hidden, angles, rooms, at_hand=addresses is not None)
        for layer in stored:
            layer.took_one()
        self._local.output = out
        return out

    # --- whether the tape may stand in -------------------------------------------------------------------------

    def _stored(self, hidden: torch.Tensor, passed: dict[str, Any]) -> list[GrowingLayer] | None:
        """The layers' caches, if the tape can take this call."""
        cache = passed.get("past_key_values")
        if (
            hidden.dim() != 3
            or hidden.shape[1] != 1
            or hidden.shape[0] > MOST_TOKENS
            or hidden.dtype is not self._dtype
            or hidden.shape[2] != self._hidden
            or passed.get("attention_mask") is not None
            or type(cache) is not DynamicCache
            or len(cache.layers) != len(self._layers)
            or not is_plain(hidden)
            or any(passed.get(name) for name in TELLING)
            or any(config._attn_implementation != IMPLEMENTATION for config in self._configs)
            or not self._watch.finds_nothing()
        ):
            return None
        if not all(type(layer) is GrowingLayer for layer in cache.layers):
            return None
        stored: list[GrowingLayer] = cache.layers  # type: ignore[assignment]
        return stored

    def _rooms(self, stored: list[GrowingLayer], hidden: torch.Tensor) -> list[Room] | None:
        first = self._layers[0]
        rooms = [layer.room_for_one(hidden.shape[0], first.kv_heads, first.width, hidden.dtype) for layer in stored]
        found = [room for room in rooms if room is not None]
        if len(found) < len(rooms) or any(room.past != found[0].past for room in found):
            return None
        return found

    def _takes(self, angles: Any, hidden: torch.Tensor) -> bool:
        return (
            type(angles) is tuple
            and len(angles) == 2
            and all(
                type(part) is torch.Tensor
                and part.dtype is hidden.dtype
                and part.shape[1:] == (1, self._layers[0].angles)
                and part.shape[0] in (1, hidden.shape[0])
                for part in angles
            )
        )

    # --- running -----------------------------------------------------------------------------------------------

    def _run(
        self, tape: StackTape, hidden: torch.Tensor, angles: Any, rooms: list[Room], *, at_hand: bool
    ) -> torch.Tensor:
        pool = kernel_pool()
        tape.x.copy_(hidden)
        tape.point_to(angles[0], angles[1], rooms)
        index, row = 0, 0
        while index < len(self._layers):
            taped = self._taped_from(tape, index) if at_hand else 0
            if taped:
                row = self._play_whole(tape, pool, row, index, index + taped)
            else:
                tape.play(pool, row, tape.mlp_rows[index])
                torch.add(tape.residual, self._mlps[index](tape.normed.clone()), out=tape.x)
                row = tape.end_rows[index]
            index += max(taped, 1)
        return tape.x.clone()

    def _play_whole(self, tape: StackTape, pool: Pool, row: int, first: int, end: int) -> int:
        """Layers from `first` to before `end` from the tape alone, from `row` on; returns the row after them."""
        assert self._experts is not None
        while (stopped := tape.play(pool, row, tape.end_rows[end - 1])) != tape.end_rows[end - 1]:
            choice = tape.choices[bisect_right(tape.end_rows, stopped)]
            assert choice is not None
            # Which of equals come first is torch's to say.
            choice.ids.copy_(torch.topk(choice.shares, choice.ids.shape[1]).indices)
            row = stopped
        for choice, first_key in zip(tape.choices[first:end], tape.moe[first:end], strict=True):
            assert choice is not None and first_key is not None
            self._experts.note_taped([first_key + expert for expert in sorted(set(choice.ids.view(-1).tolist()))])
        return stopped

    def _taped_from(self, tape: StackTape, index: int) -> int:
        """How many layers from here on the tape computes whole."""
        count = 0
        while index + count < len(tape.choices) and tape.choices[index + count] is not None:
            count += 1
        return count

    def _tape(self, batch: int, addresses: Addresses | None) -> StackTape:
        tapes: dict[int, StackTape] = self._local.__dict__.setdefault("tapes", {})
        tape = tapes.get(batch)
        if tape is None:
            # Tensors made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                tape = tapes[batch] = StackTape(self._layers, self._taped(), batch)
        if addresses is not None and addresses is not tape.addresses:
            tape.take_addresses(addresses)
        return tape

    def _taped(self) -> list[TapedMoe | None]:
        if self._experts is None:
            return [None] * len(self._layers)
        known = {layer.module: layer for layer in self._experts.layers if layer.activation is not None}
        return [
            None
            if parts is None or parts.experts not in known
            else TapedMoe(parts, known[parts.experts], np.zeros(known[parts.experts].count, np.int64))
            for parts in self._moe
        ]
