"""Cosines and sines of rotary embeddings for the positions that come next, made for many of them at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from offload.hf.fused.stack_tape import raw

AHEAD_POSITIONS = 64

# Frequencies of the other kinds depend on how long a sequence is.
_STEADY = ("default", "linear", "llama3", "yarn")

_TRIED_POSITIONS = (0, 1000, 100_000)


class _Made(NamedTuple):
    """Angles of the positions from `first` on.

    Attributes:
        state: that they were made in.
        first: position.
        rows: cosines and sines of each position, [positions, 2, 1, angles], as `raw` gives them.
    """

    state: object
    first: int
    rows: npt.NDArray[np.integer]


class Angles:
    """The angles of one position after the other, as a model's own module gives them."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Begin.

        Args:
            module: of the form `cos, sin = module(x, position_ids)`, on the CPU.
            dtype: of the hidden states.
        """
        self._module = module
        self._like = torch.zeros(1, 1, 1, dtype=dtype, device="cpu")
        self._made: _Made | None = None
        self._count = AHEAD_POSITIONS if self._may_be_made_ahead() else 1

    def at(self, position: int) -> npt.NDArray[np.integer]:
        """Cosines and sines [2, 1, angles] of a position in the dtype of the hidden states, as `raw` gives them."""
        if self._count == 1:
            alone: npt.NDArray[np.integer] = self._rows(position)[0]
            return alone
        made, state = self._made, self._state()
        if made is None or made.state != state or not 0 <= position - made.first < self._count:
            made = self._made = _Made(state, position, self._rows(position))
        row: npt.NDArray[np.integer] = made.rows[position - made.first]
        return row

    def _rows(self, first: int) -> npt.NDArray[np.integer]:
        parts = [raw(part.to(self._like.dtype))[0] for part in self._make(first, self._count)]
        return np.stack(parts, 1)[:, :, None]

    def _make(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Made in inference mode they could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(first, first + count, device="cpu").unsqueeze(0)
            cos, sin = self._module(self._like, position_ids=positions)
        return cos, sin

    def _state(self) -> tuple[object, ...]:
        """Changes with what a module's angles depend on."""
        tensors = [tensor for tensor in self._module._buffers.values() if tensor is not None]
        return (
            getattr(self._module, "attention_scaling", None),
            *((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors),
        )

    def _may_be_made_ahead(self) -> bool:
        """Whether many positions at once have the bits of each alone."""
        if getattr(self._module, "rope_type", None) not in _STEADY:
            return False
        for first in _TRIED_POSITIONS:
            together = self._make(first, AHEAD_POSITIONS)
            for index in (0, 1, AHEAD_POSITIONS - 1):
                alone = self._make(first + index, 1)
                if not all(torch.equal(a[:, index : index + 1], b) for a, b in zip(together, alone, strict=True)):
                    return False
        return True
