"""One expert is one bundle: its matrices and biases, contiguous, in one order, for every tier.

    gate [I, H] | up [I, H] | down [H, I] | gate_bias [I] | up_bias [I] | down_bias [H]

Matrices of bf16, fp16 and fp32 are row-major, rows are outputs (the orientation of `torch.nn.functional.linear`),
whatever the checkpoint does, and biases are of the same type. Packed formats (`formats.packed`) keep codes, then
scales, then biases as fp32:

    gate | up | down | gate_scale | up_scale | down_scale | gate_bias | up_bias | down_bias

`up` follows `gate` without a gap, and so do up's scales and bias, so the two read as one matrix ([2I, H]; of packed
formats the tiles of gate, then those of up; not for scales of fp8_e4m3, whose blocks of 128 rows start anew with up).
Every other component starts at a multiple of 64 bytes. The bundle's size is a multiple of 4 KiB: any bundle of a
file whose data starts aligned can be read with O_DIRECT straight into a slot. Padding bytes are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from formats.elements import ELEMENT_FORMATS, FP32, ElementFormat
from formats.packed import PACKED_FORMATS, MatrixLayout, round_up

BUNDLE_ALIGNMENT_BYTES = 4096
COMPONENT_ALIGNMENT_BYTES = 64

MATRICES = ("gate", "up", "down")
COMPONENT_ORDER = (
    *MATRICES,
    *(f"{name}_scale" for name in MATRICES),
    *(f"{name}_bias" for name in MATRICES),
)
EXPERT_FORMATS = (*ELEMENT_FORMATS, *PACKED_FORMATS)


@dataclass(frozen=True)
class Component:
    """Where the weights, the scales or the bias of one matrix lie in a bundle.

    Attributes:
        name: one of COMPONENT_ORDER.
        shape: (rows, columns) of a matrix, (length,) of a bias, `MatrixLayout.scales_shape` of scales.
        offset: bytes from the bundle's start.
        nbytes: bytes, without padding after it; codes of packed formats include those of padding rows and columns.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class BundleLayout:
    """The byte layout of one expert.

    Attributes:
        hidden: H, length of the expert's input and output.
        intermediate: I, length between the up and the down projection.
        format: one of EXPERT_FORMATS.
        has_gate: False for experts with an up projection only.
        has_bias: True where every projection has a bias.
    """

    hidden: int
    intermediate: int
    format: str
    has_gate: bool = True
    has_bias: bool = False

    def __post_init__(self) -> None:
        if self.hidden <= 0 or self.intermediate <= 0:
            raise ValueError(f"an expert of hidden={self.hidden}, intermediate={self.intermediate} has no weights")
        if self.format not in EXPERT_FORMATS:
            raise ValueError(f"unknown format {self.format!r}; known: {', '.join(EXPERT_FORMATS)}")

    @property
    def is_packed(self) -> bool:
        """Whether the matrices are codes and scales."""
        return self.format in PACKED_FORMATS

    @property
    def element(self) -> ElementFormat:
        """The element format of formats that are not packed.

        Raises:
            ValueError: the format is packed.
        """
        if self.is_packed:
            raise ValueError(f"{self.format} is a packed format; its matrices have no element type")
        return ELEMENT_FORMATS[self.format]

    @property
    def bias_element(self) -> ElementFormat:
        """The element format of biases."""
        return FP32 if self.is_packed else self.element

    @property
    def safetensors_dtype(self) -> str:
        """The dtype tag of a safetensors header that holds bundles."""
        return "U8" if self.is_packed else self.element.safetensors_dtype

    def shape(self, name: str) -> tuple[int, int]:
        """(rows, columns) of one of MATRICES."""
        return (self.hidden, self.intermediate) if name == "down" else (self.intermediate, self.hidden)

    def matrix(self, name: str) -> MatrixLayout:
        """The layout of one of MATRICES in a packed format.

        Raises:
            ValueError: the format is not packed.
        """
        return MatrixLayout(*self.shape(name), self.format)

    @cached_property
    def components(self) -> dict[str, Component]:
        """The components by name, in the order in which they lie."""
        components: dict[str, Component] = {}
        end = 0
        for name in COMPONENT_ORDER:
            matrix, _, kind = name.partition("_")
            if matrix == "gate" and not self.has_gate:
                continue
            if (kind == "bias" and not self.has_bias) or (kind == "scale" and not self.is_packed):
                continue
            shape, nbytes = self._extent(matrix, kind)
            follows_gate = matrix == "up" and self.has_gate
            offset = end if follows_gate else round_up(end, COMPONENT_ALIGNMENT_BYTES)
            components[name] = Component(name, shape, offset, nbytes)
            end = offset + nbytes
        return components

    def _extent(self, matrix: str, kind: str) -> tuple[tuple[int, ...], int]:
        rows, columns = self.shape(matrix)
        if kind == "bias":
            return (rows,), self.bias_element.nbytes(rows)
        if not self.is_packed:
            return (rows, columns), self.element.nbytes(rows * columns)
        layout = self.matrix(matrix)
        if kind == "scale":
            return layout.scales_shape, layout.scales_nbytes
        return (rows, columns), layout.codes_nbytes

    @cached_property
    def payload_nbytes(self) -> int:
        """Bytes of the components alone."""
        return sum(component.nbytes for component in self.components.values())

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the bundle with padding; a multiple of 4 KiB."""
        last = list(self.components.values())[-1]
        return round_up(last.offset + last.nbytes, BUNDLE_ALIGNMENT_BYTES)
