"""One expert is one bundle: its matrices and biases, contiguous, in one order, for every tier.

    gate [I, H] | up [I, H] | down [H, I] | gate_bias [I] | up_bias [I] | down_bias [H]

All row-major, rows are outputs (the orientation of `torch.nn.functional.linear`), whatever the checkpoint
does. `up` follows `gate` without a gap, so the two read as one [2I, H] matrix; every other component starts at
a multiple of 64 bytes. The bundle's size is a multiple of 4 KiB: any bundle of a file whose data starts aligned
can be read with O_DIRECT straight into a slot. Padding bytes are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from formats.elements import ELEMENT_FORMATS, ElementFormat

BUNDLE_ALIGNMENT_BYTES = 4096
COMPONENT_ALIGNMENT_BYTES = 64

COMPONENT_ORDER = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Component:
    """Where one matrix or bias lies in a bundle.

    Attributes:
        name: one of COMPONENT_ORDER.
        shape: (rows, columns) of a matrix, (length,) of a bias.
        offset: bytes from the bundle's start.
        nbytes: bytes, without padding.
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
        format: name of the element format, a key of ELEMENT_FORMATS.
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
        if self.format not in ELEMENT_FORMATS:
            raise ValueError(f"unknown format {self.format!r}; known: {', '.join(ELEMENT_FORMATS)}")

    @property
    def element(self) -> ElementFormat:
        """The element format."""
        return ELEMENT_FORMATS[self.format]

    @cached_property
    def components(self) -> dict[str, Component]:
        """The components by name, in the order in which they lie."""
        shapes: dict[str, tuple[int, ...]] = {
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "gate_bias": (self.intermediate,),
            "up_bias": (self.intermediate,),
            "down_bias": (self.hidden,),
        }
        components: dict[str, Component] = {}
        end = 0
        for name in COMPONENT_ORDER:
            if (name.startswith("gate") and not self.has_gate) or (name.endswith("bias") and not self.has_bias):
                continue
            shape = shapes[name]
            follows_gate = name in ("up", "up_bias") and self.has_gate
            offset = end if follows_gate else round_up(end, COMPONENT_ALIGNMENT_BYTES)
            elements = shape[0] * (shape[1] if len(shape) == 2 else 1)
            nbytes = self.element.nbytes(elements)
            components[name] = Component(name, shape, offset, nbytes)
            end = offset + nbytes
        return components

    @cached_property
    def payload_nbytes(self) -> int:
        """Bytes of the weights and biases alone."""
        return sum(component.nbytes for component in self.components.values())

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the bundle with padding; a multiple of 4 KiB."""
        last = list(self.components.values())[-1]
        return round_up(last.offset + last.nbytes, BUNDLE_ALIGNMENT_BYTES)
