"""The tape of a stack of decoder layers for a number of sequences, and what is patched at every token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from ctypes import memmove
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cpu_kernels.tape import Choice, Spot, Tape
from cpu_kernels.threads import Pool
from offload.hf.fused.decoder_parts import DecoderParts, Norm
from offload.hf.fused.kv_cache import Room
from offload.hf.fused.moe_parts import MoeParts
from offload.hf.quantised_linear import QuantisedLinear
from offload.moe.layer import ExpertsLayer

Addresses = npt.NDArray[np.int64]
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Of a layer's number, its query [batch, heads, 1, width], new keys and values [batch, kv heads, 1, width], which it
keeps, and the scale of scores: attention to all keys, fp32 [batch, heads, 1, width]."""

_INTEGERS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class TapedMoe:
    """A MoE block that the tape computes while all its experts are at hand.

    Attributes:
        parts: of the block.
        layer: its experts.
        addresses: int64 [E] of their bundles; filled by whoever plays the tape.
    """

    parts: MoeParts
    layer: ExpertsLayer
    addresses: Addresses


@dataclass(frozen=True)
class TapedBlock:
    """A MoE block on the tape.

    Attributes:
        first_key: of its experts.
        hidden: [batch, hidden], what its router is given.
        logits: [batch, experts], its router's.
        choice: the last one.
        chosen: the ids of `choice`, int64 [batch, top_k].
        addresses: int64 [E] of the bundles, as the tape takes them; what has the address 0 is not computed.
        experts_row: the row that computes experts; the choice is made then.
    """

    first_key: int
    hidden: torch.Tensor
    logits: torch.Tensor
    choice: Choice
    chosen: npt.NDArray[np.int64]
    addresses: Addresses
    experts_row: int


@dataclass
class _Scratch:
    """Addresses that all layers share, each [batch, ...]."""

    normed: int
    projected: int
    q: int
    k: int
    v: int
    q_turned: int
    k_turned: int
    attended: int


class StackTape:
    """For each layer: norm → projections → norms, rotation → cache → attention → projection → sum → norm, and then
    router → experts → sum where the MoE block is taped. One new token of each sequence.

    Runs on the thread that made it. Holds addresses: whoever plays it has seen that the weights are where they were.

    Attributes:
        x: [batch, 1, hidden]; in: the first layer's input; out: the last layer's output.
        residual: [batch, 1, hidden]; after a layer's attention: the residual stream.
        normed: [batch, 1, hidden]; likewise: the input of its MLP.
        blocks: for each layer: its MoE block, if it is taped; else None.
        mlp_rows: for each layer: the row at which its attention is done.
        end_rows: for each layer: the row at which it is done, if its MoE block is taped; else `mlp_rows`.
        whole_until: for each layer: the layer before which those end that are taped whole from it on.
        last: [batch, 1, hidden]; the model's last norm of `x`, after `norm_row`.
        norm_row: the row at which that norm is done, if the tape computes it.
        rooms: as `take_rooms` took them last.
        addresses: of all experts, as they were last taken; None where those of `blocks` are others.
    """

    def __init__(
        self,
        layers: Sequence[DecoderParts],
        moe: Sequence[TapedMoe | None],
        last: Norm | None,
        head: nn.Module | None,
        batch: int,
    ) -> None:
        """Write the tape.

        Args:
            layers: parts of each, all of the same sizes.
            moe: for each layer, its taped MoE block or None.
            last: the norm after the last layer; None where the tape does not compute it.
            head: the output layer after that norm; None where the tape does not compute it.
            batch: sequences.
        """
        first = layers[0]
        weight = first.before.module.get_parameter("weight")
        hidden, width, heads, kv_heads = len(weight), first.width, first.heads, first.kv_heads
        self._tape = Tape(weight.dtype)
        self.addresses: Addresses | None = None
        self._batch, self._kv_heads, self._width = batch, kv_heads, width
        self.x, self.residual, self.normed, self.last = (
            self._tape.scratch(batch * hidden).view(batch, 1, hidden) for _ in range(4)
        )
        self._angles = self._tape.scratch(2 * batch * first.angles).view(2, batch, 1, first.angles)
        self._cos, self._sin = self._angles
        self._raw_angles = raw(self._angles)[:, :, 0]
        self._x_address, self._row_nbytes = self.x.data_ptr(), hidden * self.x.itemsize
        counts = (hidden, hidden, heads * width, kv_heads * width, kv_heads * width, heads * width, kv_heads * width)
        shared = [self._tape.scratch(batch * n) for n in (*counts, heads * width)]
        scratch = _Scratch(*(tensor.data_ptr() for tensor in shared))
        self._values, self._query, self._keys, self._attended = (
            tensor.view(batch, -1, 1, width) for tensor in shared[4:]
        )
        self._stores: list[tuple[list[Spot], list[Spot]]] = []
        self._attentions: list[dict[str, Spot]] = []
        self._attention_starts: list[int] = []
        self._attention_ends: list[int] = []
        self._scales: list[float] = []
        self._attend: Attend | None = None
        self.mlp_rows: list[int] = []
        self.end_rows: list[int] = []
        # A tape lives as long as its thread: it must not hold modules, which hold the runtime.
        self.blocks: list[TapedBlock | None] = []
        choices = batch * max((taped.parts.top_k for taped in moe if taped is not None), default=0)
        ids = self._tape.scratch(len(layers) * choices, torch.int64).view(len(layers), choices)
        for parts, taped, chosen in zip(layers, moe, ids, strict=True):
            self._attention_rows(parts, scratch)
            self.mlp_rows.append(self._tape.rows)
            self.blocks.append(None if taped is None else self._moe_rows(taped, chosen))
            self.end_rows.append(self._tape.rows)
        self._chosen = ids.numpy()
        self._choices = [
            (0, 0) if block is None else (block.first_key, block.choice.ids.numel()) for block in self.blocks
        ]
        if last is not None:
            _norm(self._tape, last, self.x.data_ptr(), batch, self.last.data_ptr())
        self.norm_row = self._tape.rows
        self._logits: Spot | None = None
        if head is not None:
            self._logits = _linear(self._tape, head, self.last.data_ptr(), batch, 0)
        self.whole_until = list(range(len(layers)))
        for index in reversed(range(len(layers))):
            if self.blocks[index] is not None:
                self.whole_until[index] = self.whole_until[index + 1] if index + 1 < len(layers) else index + 1
        self._words = self._tape.words
        self.rooms: Sequence[Room] = ()
        self._flat = self._words.reshape(-1)
        self._places = self._spots(spot for spots, _ in self._stores for spot in spots)
        self._tokens = self._spots(spots["tokens"] for spots in self._attentions)
        self._starts = np.zeros(2 * len(layers), np.int64)

    def _spots(self, spots: Iterable[Spot]) -> npt.NDArray[np.intp]:
        """Where they are in all words."""
        return np.array([row * self._words.shape[1] + word for row, word in spots], np.intp)

    def _attention_rows(self, parts: DecoderParts, at: _Scratch) -> None:
        tape, batch = self._tape, self._batch
        x, residual, normed = (tensor.data_ptr() for tensor in (self.x, self.residual, self.normed))
        width, heads, kv_heads = parts.width, parts.heads, parts.kv_heads
        _norm(tape, parts.before, x, batch, at.normed)
        for module, out in ((parts.q, at.q), (parts.k, at.k), (parts.v, at.v)):
            _linear(tape, module, at.normed, batch, out)
        if parts.norms_first:
            _norms(tape, parts, batch, at.q, at.k)
        tape.rotary(
            at.q, heads, at.k, kv_heads, batch, width, self._cos.data_ptr(), self._sin.data_ptr(), parts.angles,
            at.q_turned, at.k_turned, shared_angles=parts.shared_angles,
        )  # fmt: skip
        if not parts.norms_first:
            _norms(tape, parts, batch, at.q_turned, at.k_turned)
        self._attention_starts.append(tape.rows)
        stores = [tape.store_rows(source, batch * kv_heads, width) for source in (at.k_turned, at.v)]
        self._stores.append(([place for place, _ in stores], [stride for _, stride in stores]))
        self._attentions.append(
            tape.attention(at.q_turned, batch, kv_heads, heads // kv_heads, width, at.attended, parts.scale)
        )
        self._attention_ends.append(tape.rows)
        self._scales.append(parts.scale)
        _linear(tape, parts.o, at.attended, batch, at.projected)
        tape.add(x, at.projected, self.x.numel(), residual)
        _norm(tape, parts.after, residual, batch, normed)

    def _moe_rows(self, taped: TapedMoe, chosen: torch.Tensor) -> TapedBlock:
        tape, parts, batch, experts = self._tape, taped.parts, self._batch, len(taped.parts.weight)
        normed = self.normed.data_ptr()
        logits = tape.scratch(batch * experts).view(batch, experts)
        tape.linear(normed, parts.weight, None, batch, logits.data_ptr())
        choice = tape.choose(
            logits.data_ptr(), experts, batch, parts.top_k, renormalise=parts.renormalise, rounded=parts.rounded,
            ids=chosen[: batch * parts.top_k],
        )  # fmt: skip
        assert taped.layer.activation is not None
        experts_row = tape.rows
        sums = tape.experts(taped.layer.layout, taped.layer.activation, taped.addresses, choice, normed)
        tape.add_sums(self.residual.data_ptr(), sums, self.x.numel(), self.x.data_ptr())
        hidden = self.normed.view(batch, -1)
        return TapedBlock(
            taped.layer.first_key, hidden, logits, choice, choice.ids.numpy(), taped.addresses, experts_row
        )

    def take_addresses(self, addresses: Addresses | None) -> None:
        """Where all experts lie, int64 by key; None: no expert is there yet, those of `blocks` are filled in later."""
        for block in self.blocks:
            if block is not None:
                own, first = block.addresses, block.first_key
                own[:] = 0 if addresses is None else addresses[first : first + len(own)]
        self.addresses = addresses

    def take_angles(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """The angles of the next token, [batch or 1, 1, width of the angles]."""
        self._cos.copy_(cos)
        self._sin.copy_(sin)

    def enter(self, embedding: int, ids: Sequence[int], angles: npt.NDArray[np.integer]) -> None:
        """The first layer's input and the angles of the next token.

        Args:
            embedding: address of [vocabulary, hidden], contiguous, of the tape's dtype.
            ids: the token of each sequence, in the vocabulary.
            angles: cosines and sines [2, 1, width of the angles], as `raw` gives them.
        """
        nbytes = self._row_nbytes
        for sequence, token in enumerate(ids):
            memmove(self._x_address + sequence * nbytes, embedding + token * nbytes, nbytes)
        self._raw_angles[:] = angles

    def write_logits_to(self, logits: torch.Tensor) -> None:
        """Where the output layer's row writes, contiguous [batch, 1, vocabulary]."""
        assert self._logits is not None
        self._words[self._logits] = logits.data_ptr()

    def chosen_keys(self, first: int, end: int) -> list[list[int]]:
        """For layers from `first` to before `end`, all of them taped: the experts that were chosen, ascending."""
        pairs = zip(self._choices[first:end], self._chosen[first:end].tolist(), strict=True)
        return [sorted({key + expert for expert in experts[:count]}) for (key, count), experts in pairs]

    def attend_by(self, attend: Attend) -> None:
        """Let attention of the next token, and writing its keys and values, not be the tape's but of a function."""
        self._attend, self.rooms = attend, ()

    def let_go(self) -> None:
        """Hold on to nothing of whom `attend_by` named: a cache's blocks are free when the cache goes."""
        self._attend = None

    def take_rooms(self, rooms: Sequence[Room]) -> None:
        """Where each layer's keys and values go from now on, for the tape to write and attend."""
        self._attend = None
        for index, room in enumerate(rooms):
            self._take_room(index, room)
        self.rooms = rooms

    def take_position(self, past: int) -> None:
        """The next token comes after so many, in the rooms that were taken."""
        self._flat[self._places] = self._starts + past * self._width * self.x.itemsize
        self._flat[self._tokens] = past + 1

    def _take_room(self, index: int, room: Room) -> None:
        words, spots = self._words, self._attentions[index]
        head = room.tokens * self._width
        for name, value in zip(("keys", "values"), room.addresses, strict=True):
            words[spots[name]] = value
        for name in ("key", "value"):
            words[spots[f"{name}_head"]] = head
            words[spots[f"{name}_batch"]] = self._kv_heads * head
        for stride in self._stores[index][1]:
            words[stride] = head * self.x.itemsize
        self._starts[2 * index : 2 * index + 2] = room.addresses

    @property
    def rows(self) -> int:
        """How many there are."""
        return self._tape.rows

    def play(self, pool: Pool, first: int, end: int) -> int:
        """See `Tape.play`."""
        if self._attend is None:
            return self._tape.play(pool, first, end)
        for index in range(bisect_left(self._attention_starts, first), bisect_left(self._attention_starts, end)):
            start = self._attention_starts[index]
            stopped = self._tape.play(pool, first, start)
            if stopped != start:
                return stopped
            out = self._attend(index, self._query, self._keys, self._values, self._scales[index])
            self._attended.copy_(out.view_as(self._attended))
            first = self._attention_ends[index]
        return self._tape.play(pool, first, end)


def _norm(tape: Tape, norm: Norm, x: int, rows: int, out: int) -> None:
    tape.rms_norm(x, norm.module.get_parameter("weight"), rows, out, norm.epsilon, norm.form)


def _norms(tape: Tape, parts: DecoderParts, batch: int, q: int, k: int) -> None:
    """Queries and keys [batch, heads, width] in place: a norm reads a row before it writes it."""
    for norm, x, heads in ((parts.q_norm, q, parts.heads), (parts.k_norm, k, parts.kv_heads)):
        if norm is not None:
            columns = len(norm.module.get_parameter("weight"))
            _norm(tape, norm, x, batch * heads * parts.width // columns, x)


def raw(tensor: torch.Tensor) -> npt.NDArray[np.integer]:
    """A tensor's memory as integers as large as its elements, on the CPU: NumPy knows no bf16."""
    found: npt.NDArray[np.integer] = tensor.detach().view(_INTEGERS[tensor.itemsize]).numpy()
    return found


def _linear(tape: Tape, module: nn.Module, x: int, tokens: int, out: int) -> Spot:
    if isinstance(module, QuantisedLinear):
        return tape.packed_linear(x, module.weights, module.bias, tokens, out)
    return tape.linear(x, module.get_parameter("weight"), module._parameters["bias"], tokens, out)
