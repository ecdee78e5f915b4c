"""The element formats that weights are kept in, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ElementFormat:
    """How one weight lies in memory.

    Attributes:
        name: the name used in plans, stores and on the command line.
        bits: bits of one weight, scales not counted.
        safetensors_dtype: the dtype tag of a safetensors header that holds these bytes.
    """

    name: str
    bits: int
    safetensors_dtype: str

    def nbytes(self, elements: int) -> int:
        """Bytes of `elements` weights."""
        return elements * self.bits // 8


BF16 = ElementFormat("bf16", 16, "BF16")
FP16 = ElementFormat("fp16", 16, "F16")
FP32 = ElementFormat("fp32", 32, "F32")

ELEMENT_FORMATS = {element.name: element for element in (BF16, FP16, FP32)}
