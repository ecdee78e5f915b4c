"""Tensors that are read when they are indexed, as transformers' loader expects of a state dict's values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from offload.checkpoint.checkpoint import Checkpoint
from offload.checkpoint.dtypes import TORCH_DTYPES
from offload.checkpoint.encoded import EncodedMatrix
from placement.tensors import EncodedSpan, TensorSpan


class LazyTensor:
    """A stored tensor that stands in for a safetensors slice: `lazy[...]` reads it, anew each time.

    Attributes:
        span: where it lies.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        span: TensorSpan,
        *,
        once: bool = False,
        on_read: Callable[[int], None] | None = None,
    ) -> None:
        """Describe a tensor; nothing is read.

        Args:
            checkpoint: must stay open while it is indexed.
            span: where it lies.
            once: keep what is read out of the page cache.
            on_read: told the bytes of each read, from the thread that reads.
        """
        self._checkpoint = checkpoint
        self._once = once
        self._on_read = on_read
        self.span = span

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._checkpoint.read(self.span, once=self._once)
        if self._on_read is not None:
            self._on_read(self.span.nbytes)
        # The read is fresh memory already, and for `...` torch would only make a second object of it.
        return tensor if index is Ellipsis else tensor[index]

    def encoded(self) -> torch.Tensor | EncodedMatrix:
        """Read the tensor, of a quantised checkpoint as codes and scales where it is a matrix [N, K] of such."""
        if not isinstance(self.span, EncodedSpan) or self.span.transposed or len(self.span.shape) != 2:
            return self[...]
        matrix = self._checkpoint.read_encoded(self.span, once=self._once)
        if self._on_read is not None:
            self._on_read(self.span.nbytes)
        return matrix

    @property
    def shape(self) -> torch.Size:
        """Shape of the stored tensor."""
        return torch.Size(self.span.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored tensor."""
        return TORCH_DTYPES[self.span.dtype]

    def get_shape(self) -> list[int]:
        """Shape, as a safetensors slice gives it."""
        return list(self.span.shape)

    def get_dtype(self) -> str:
        """The safetensors tag, as a safetensors slice gives it."""
        return self.span.dtype

    def __repr__(self) -> str:
        return f"LazyTensor({self.span.dtype} {list(self.span.shape)} of {self.span.file!r})"


def lazy_state_dict(
    checkpoint: Checkpoint,
    spans: Mapping[str, TensorSpan],
    *,
    once: bool = False,
    on_read: Callable[[int], None] | None = None,
) -> dict[str, LazyTensor]:
    """A state dict of spans, such as `CheckpointMap.dense`, none of them read yet."""
    return {key: LazyTensor(checkpoint, span, once=once, on_read=on_read) for key, span in spans.items()}
