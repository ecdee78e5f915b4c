"""Running a stack of decoder layers for one new token: layer after layer from the tape, Python only where it must.

While all experts of a MoE block are at hand, the tape computes it too, and consecutive layers are one call. While some
are not, it chooses them, and computes them as they come. Blocks that it does not know run by their own code between two
parts of the tape.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import DynamicCache

from cpu_kernels.linear import MOST_TOKENS
from cpu_kernels.threads import Pool
from offload.devices.host_threads import kernel_pool
from offload.hf.fused.attention import IMPLEMENTATION, TELLING
from offload.hf.fused.conditions import is_plain
from offload.hf.fused.decoder_parts import DecoderParts, Norm, dtype_of
from offload.hf.fused.kv_cache import Form
from offload.hf.fused.moe_parts import MoeParts
from offload.hf.fused.stack_tape import Addresses, StackTape, TapedBlock, TapedMoe
from offload.hf.fused.tape_caches import TapeCache, tape_cache
from offload.hf.fused.watch import TapeHook, Watch
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

    def note_taped(self, layers: list[list[int]]) -> None:
        """A tape has computed these experts of each of some layers."""
        ...

    @property
    def come_to_tapes(self) -> bool:
        """Whether `step_taped` may be called."""
        ...

    def step_taped(
        self, first_key: int, choice: npt.NDArray[np.int64], addresses: Addresses, compute: Callable[[], None]
    ) -> None:
        """One MoE layer, int64 [tokens, top_k] chosen, whose experts a tape computes as they come. With the lock."""
        ...


class Until(Enum):
    """What a run ends with."""

    LAYERS = auto()
    NORM = auto()
    LOGITS = auto()


class Stack:
    """The layers of a model, all of one form and one size.

    Attributes:
        dtype: of their weights that are not packed, and of what they take and give.
    """

    def __init__(
        self,
        layers: Sequence[DecoderParts],
        moe: Sequence[MoeParts | None],
        experts: ExpertsAtHand | None,
        last: Norm | None = None,
    ) -> None:
        """Make a stack; tapes are written when they are first needed.

        Args:
            layers: the parts of each.
            moe: the parts of each one's MoE block; None where it has another form, or none.
            experts: where the experts come from; None: no block is taped.
            last: the norm after the last layer, if `normed` is to be asked for.
        """
        self._layers = list(layers)
        self._moe = list(moe)
        self._last = last
        self._head: nn.Module | None = None
        self._experts = experts
        self._mlps = [parts.mlp for parts in layers]
        self._configs: list[Any] = list(
            {id(parts.attention.config): parts.attention.config for parts in layers}.values()
        )
        self.dtype = dtype_of(layers[0])
        self._hidden = len(layers[0].before.module.get_parameter("weight"))
        self._watch = Watch(module for parts in layers for module in parts.modules())
        self._moe_watch = Watch(module for parts in moe if parts is not None for module in parts.modules())
        self._local = threading.local()

    def watch(self, decoder: nn.Module) -> None:
        """Leave the layers to their own code when a hook must see one's output, or one is another or has other parts.

        Args:
            decoder: has the layers as its child "layers".
        """
        layers = decoder.get_submodule("layers")
        self._watch.also_hooks_of(layers.children())
        self._watch.also_children_of((layers, *layers.children()))
        self._watch.also_children_of((decoder,), only="layers")

    def end_with(self, head: nn.Module) -> None:
        """Let tapes compute the output layer too, after the norm. Before the first one is written."""
        self._head = head

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
        angles: Any = passed.get("position_embeddings")
        if not self._takes(hidden, passed) or not self._turns(angles, hidden):
            return None
        ready = self.ready(passed.get("past_key_values"), hidden.shape[0])
        if ready is None:
            return None

        def enter(tape: StackTape) -> None:
            tape.x.copy_(hidden)
            tape.take_angles(*angles)

        out = self.decode(ready, enter, Until.LAYERS).x.clone()
        self._local.output = out
        return out

    # --- whether the tape may stand in -------------------------------------------------------------------------

    def ready(self, cache: Any, batch: int) -> TapeCache | None:
        """What the tape writes to, if it can take one new token of each of `batch` sequences now."""
        if (
            batch > MOST_TOKENS
            or type(cache) is not DynamicCache
            or len(cache.layers) != len(self._layers)
            or any(config._attn_implementation != IMPLEMENTATION for config in self._configs)
            or not self._watch.finds_nothing()
        ):
            return None
        tapes = self._tapes()
        return tape_cache(cache, self._form(batch), tapes.get(batch))

    def _form(self, batch: int) -> Form:
        assert self.dtype is not None
        return batch, self._layers[0].kv_heads, self._layers[0].width, self.dtype

    def _takes(self, hidden: torch.Tensor, passed: dict[str, Any]) -> bool:
        return (
            hidden.dim() == 3
            and hidden.shape[1] == 1
            and hidden.dtype is self.dtype
            and hidden.shape[2] == self._hidden
            and passed.get("attention_mask") is None
            and is_plain(hidden)
            and not any(passed.get(name) for name in TELLING)
        )

    def _turns(self, angles: Any, hidden: torch.Tensor) -> bool:
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

    def decode(self, ready: TapeCache, enter: Callable[[StackTape], object], until: Until) -> StackTape:
        """All layers, for one new token of each sequence, which the cache then has.

        Args:
            ready: see `ready`.
            enter: gives the tape the first layer's input and the angles.
            until: what comes last.

        Returns:
            The tape with what it computed; the next run writes over it.
        """
        experts = self._experts
        if experts is None:
            tape = self._tape(ready.batch, None)
            enter(tape)
            self._run(tape, ready, until, at_hand=False, as_they_come=False)
        else:
            with experts.lock:
                known = self._moe_watch.finds_nothing()
                addresses = experts.addresses_of_all() if known else None
                tape = self._tape(ready.batch, addresses)
                enter(tape)
                come = known and addresses is None and experts.come_to_tapes
                self._run(tape, ready, until, at_hand=addresses is not None, as_they_come=come)
        ready.took_one()
        return tape

    def _run(self, tape: StackTape, cache: TapeCache, until: Until, *, at_hand: bool, as_they_come: bool) -> None:
        pool = kernel_pool()
        cache.give_to(tape)
        index, row, layers = 0, 0, len(self._layers)
        last = tape.rows if until is Until.LOGITS else tape.norm_row if until is Until.NORM else tape.end_rows[-1]
        while index < layers:
            end = tape.whole_until[index] if at_hand else index
            if end > index:
                row = self._play_whole(tape, pool, row, index, end, last)
            elif as_they_come and (block := tape.blocks[index]) is not None:
                row, end = self._play_as_they_come(tape, pool, row, block, self._moe[index]), index + 1
            else:
                tape.play(pool, row, tape.mlp_rows[index])
                torch.add(tape.residual, self._mlps[index](tape.normed.clone()), out=tape.x)
                row, end = tape.end_rows[index], index + 1
            index = end
        if row < last:
            tape.play(pool, row, last)

    def _play_whole(self, tape: StackTape, pool: Pool, row: int, first: int, end: int, last: int) -> int:
        """Layers from `first` to before `end` from the tape alone, from `row` on, and what is behind the last layer up
        to the row `last`; returns the row after them.
        """
        assert self._experts is not None
        until = tape.end_rows[end - 1] if end < len(self._layers) else last
        _play_to(tape, pool, row, until)
        self._experts.note_taped(tape.chosen_keys(first, end))
        return until

    def _play_as_they_come(
        self, tape: StackTape, pool: Pool, row: int, block: TapedBlock, parts: MoeParts | None
    ) -> int:
        """One layer from `row` on, its experts as they come; returns the row that adds them up."""
        assert self._experts is not None and parts is not None
        experts_row = block.experts_row
        _play_to(tape, pool, row, experts_row)
        _tell_hooks(parts.router, block)

        def compute() -> None:
            tape.play(pool, experts_row, experts_row + 1)

        self._experts.step_taped(block.first_key, block.chosen, block.addresses, compute)
        return experts_row + 1

    def _tape(self, batch: int, addresses: Addresses | None) -> StackTape:
        tapes = self._tapes()
        tape = tapes.get(batch)
        if tape is None:
            # Tensors made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                tape = tapes[batch] = StackTape(self._layers, self._taped(), self._last, self._head, batch)
        if addresses is not tape.addresses:
            tape.take_addresses(addresses)
        return tape

    def _tapes(self) -> dict[int, StackTape]:
        """By the number of sequences, those of this thread."""
        tapes: dict[int, StackTape] = self._local.__dict__.setdefault("tapes", {})
        return tapes

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


def _play_to(tape: StackTape, pool: Pool, row: int, end: int) -> None:
    """Rows from `row` to before `end`, through choices that are not clear."""
    while (stopped := tape.play(pool, row, end)) != end:
        block = tape.blocks[bisect_right(tape.end_rows, stopped)]
        assert block is not None
        choice = block.choice
        # Which of equals come first is torch's to say.
        choice.ids.copy_(torch.topk(choice.shares, choice.ids.shape[1]).indices)
        row = stopped


def _tell_hooks(router: nn.Module, block: TapedBlock) -> None:
    """Call a router's hooks, all of them of the kind that may be called so, as its own call would."""
    for hook in router._forward_hooks.values():
        assert isinstance(hook, TapeHook)
        choice = block.choice
        hook.routed(router, block.hidden, block.logits, choice.weights, choice.ids)
