"""Which columns a step attends to, from tensors alone."""

from __future__ import annotations

import torch


class Masks:
    """Masks [B, 1, 1, columns] of a step, as attention takes them: bool, or what is added to scores."""

    def __init__(
        self, position: torch.Tensor, valid: torch.Tensor, window: int | None, dtype: torch.dtype, *, added: bool
    ) -> None:
        """Make what stays the same.

        Args:
            position: int64 [1], of the token that a step adds.
            valid: bool [B, columns], False for padding.
            window: tokens that a layer with a window attends to, None where there is no such layer.
            dtype: of the model.
            added: give masks that are added to scores.
        """
        self._position, self._valid, self._window = position, valid, window
        self._dtype, self._added = dtype, added
        device = valid.device
        self._columns = torch.arange(valid.shape[1], device=device)
        self._back = None if window is None else torch.arange(1 - window, 1, device=device)
        self._zero = torch.zeros((), dtype=dtype, device=device)
        self._least = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)

    def full(self) -> torch.Tensor:
        """All tokens up to the position."""
        return self._finished(self._valid & (self._columns <= self._position))

    def window(self) -> torch.Tensor:
        """Of a `WindowLayer`: the last tokens, the newest in the last column."""
        assert self._back is not None
        places = self._position + self._back
        seen = self._valid.index_select(1, places.clamp(min=0))
        return self._finished(seen & (places >= 0))

    def _finished(self, seen: torch.Tensor) -> torch.Tensor:
        seen = seen[:, None, None, :]
        return torch.where(seen, self._zero, self._least) if self._added else seen
