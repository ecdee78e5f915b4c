"""Where tensors and experts lie in a checkpoint's files."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


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

    def entry(self, index: int) -> TensorSpan:
        """The span of one entry along the first axis."""
        nbytes = self.nbytes // self.shape[0]
        return TensorSpan(self.file, self.offset + index * nbytes, nbytes, self.dtype, self.shape[1:])


@dataclass(frozen=True)
class EncodedSpan(TensorSpan):
    """A tensor of weights of which codes and scales are stored; shape, dtype and nbytes are those of the weights.

    Attributes:
        file: of the codes.
        offset: of the codes.
        encoding: "mxfp4": codes are U8 [..., N, K / 32, 16], two e2m1 a byte, the first in the low half, scales U8
            [..., N, K / 32], e8m0. "fp8": codes are F8_E4M3 [..., N, K], scales floats [..., ceil(N / rows),
            ceil(K / columns)]. A weight is its code's value times its scale.
        codes: where they lie.
        scales: where they lie.
        block: (rows, columns) of the stored matrix that share a scale.
        transposed: True where the tensor is [..., K, N], False where it is [..., N, K].
    """

    encoding: str
    codes: TensorSpan
    scales: TensorSpan
    block: tuple[int, int]
    transposed: bool

    def entry(self, index: int) -> EncodedSpan:
        """The span of one entry along the first axis, which must not be one of a matrix.

        Raises:
            ValueError: the tensor is a single matrix.
        """
        if len(self.shape) < 3:
            raise ValueError(f"{self.file}: codes and scales of one matrix are not cut along {self.shape}")
        codes, scales = self.codes.entry(index), self.scales.entry(index)
        nbytes = self.nbytes // self.shape[0]
        return EncodedSpan(
            codes.file, codes.offset, nbytes, self.dtype, self.shape[1:], self.encoding, codes, scales, self.block,
            self.transposed,
        )  # fmt: skip


def encoded_span(
    encoding: str, codes: TensorSpan, scales: TensorSpan, block: tuple[int, int], dtype: str, bits: int
) -> EncodedSpan:
    """The weights of codes and scales whose shapes fit each other.

    Args:
        encoding: see EncodedSpan.
        codes: see EncodedSpan.
        scales: see EncodedSpan.
        block: see EncodedSpan.
        dtype: tag of the weights.
        bits: of a weight of that dtype.
    """
    transposed = encoding == "mxfp4"
    if encoding == "mxfp4":
        *others, rows, groups, nbytes = codes.shape
        shape = (*others, groups * nbytes * 2, rows)
    else:
        shape = codes.shape
    size = prod(shape) * bits // 8
    return EncodedSpan(codes.file, codes.offset, size, dtype, shape, encoding, codes, scales, block, transposed)


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
