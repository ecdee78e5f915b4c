"""Where tensors and experts lie in a checkpoint's files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSpan:
    """Where one tensor's bytes lie.

    Attributes:
        file: path of the file.
        offset: bytes from the file's start.
        nbytes: bytes of the tensor; equals the product of `shape` times the dtype's size.
        dtype: the safetensors tag, such as "BF16".
        shape: of the stored tensor, row-major.
    """

    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ComponentSource:
    """How one component of one expert (a matrix or a bias) is cut out of a stored tensor.

    The bytes of `span` are an array of `span.shape`; of its `axis`, the entries first, first + step, ... (`count` of
    them) are picked; the result is transposed if `transposed`. What comes out has the bundle's orientation (rows are
    outputs) and the shape of the bundle's component.

    Attributes:
        span: the bytes to read: already the expert's own contiguous range where the tensor holds many experts.
        axis: the axis of `span.shape` along which entries are picked.
        first: the first entry picked.
        step: distance of entries: 1 for a contiguous block, 2 where gate and up are interleaved.
        count: entries picked.
        transposed: True where the picked matrix is [inputs, outputs].
    """

    span: TensorSpan
    axis: int
    first: int
    step: int
    count: int
    transposed: bool
