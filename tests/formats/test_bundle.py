"""The bundle layout: nothing overlaps, everything is aligned, up follows gate."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.bundle import (
    BUNDLE_ALIGNMENT_BYTES,
    COMPONENT_ALIGNMENT_BYTES,
    COMPONENT_ORDER,
    EXPERT_FORMATS,
    BundleLayout,
    Component,
)
from formats.elements import ELEMENT_FORMATS
from formats.packed import PACKED_FORMATS, round_up

ELEMENT_NBYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
PACKED_BITS = {"int8": 8, "int4": 4, "mxfp4": 4, "fp8_e4m3": 8}


def expected_nbytes(layout: BundleLayout, part: Component) -> int:
    count = math.prod(part.shape)
    if layout.format in ELEMENT_NBYTES:
        return count * ELEMENT_NBYTES[layout.format]
    if part.name.endswith("bias"):
        return count * 4
    if part.name.endswith("scale"):
        return count * {"int8": 2, "int4": 2, "mxfp4": 1, "fp8_e4m3": 4}[layout.format]
    rows, columns = part.shape
    return round_up(rows, 16) * round_up(columns, 64) * PACKED_BITS[layout.format] // 8


def groups(rows: int, columns: int, format: str) -> tuple[int, ...]:
    if format == "fp8_e4m3":
        return (-(-rows // 128), -(-columns // 128))
    return (-(-rows // 16), round_up(columns, 64) // {"int8": 64, "int4": 32, "mxfp4": 32}[format], 16)


layouts = st.builds(
    BundleLayout,
    hidden=st.integers(1, 5000),
    intermediate=st.integers(1, 5000),
    format=st.sampled_from(EXPERT_FORMATS),
    has_gate=st.booleans(),
    has_bias=st.booleans(),
)


def test_every_format_has_its_element_size() -> None:
    assert set(ELEMENT_FORMATS) == set(ELEMENT_NBYTES)
    for name, element in ELEMENT_FORMATS.items():
        assert element.name == name
        assert element.nbytes(1000) == 1000 * ELEMENT_NBYTES[name]


@settings(deadline=None)
@given(layouts)
def test_components_are_those_that_the_expert_has_in_order(layout: BundleLayout) -> None:
    h, i = layout.hidden, layout.intermediate
    shapes: dict[str, tuple[int, ...]] = {"gate": (i, h), "up": (i, h), "down": (h, i)}
    if layout.is_packed:
        shapes |= {f"{name}_scale": groups(*shapes[name], layout.format) for name in ("gate", "up", "down")}
    shapes |= {"gate_bias": (i,), "up_bias": (i,), "down_bias": (h,)}
    if not layout.has_gate:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("gate")}
    if not layout.has_bias:
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("bias")}
    assert [name for name in COMPONENT_ORDER if name in shapes] == list(layout.components)
    for name, component in layout.components.items():
        assert component.name == name
        assert component.shape == shapes[name]
        assert component.nbytes == expected_nbytes(layout, component)


@settings(deadline=None)
@given(layouts)
def test_components_lie_apart_inside_and_aligned(layout: BundleLayout) -> None:
    parts = list(layout.components.values())
    assert parts[0].offset == 0
    for before, after in itertools.pairwise(parts):
        gap = after.offset - (before.offset + before.nbytes)
        assert 0 <= gap < COMPONENT_ALIGNMENT_BYTES
    for part in parts:
        if part.name in ("up", "up_scale", "up_bias") and layout.has_gate:
            before = layout.components[part.name.replace("up", "gate")]
            assert part.offset == before.offset + before.nbytes, "gate and up must read as one matrix"
        else:
            assert part.offset % COMPONENT_ALIGNMENT_BYTES == 0
        assert part.offset % ELEMENT_NBYTES.get(layout.format, 4) == 0
    end = parts[-1].offset + parts[-1].nbytes
    assert layout.nbytes % BUNDLE_ALIGNMENT_BYTES == 0
    assert 0 <= layout.nbytes - end < BUNDLE_ALIGNMENT_BYTES
    assert layout.payload_nbytes == sum(part.nbytes for part in parts) <= layout.nbytes


def test_a_known_layout() -> None:
    # 3 x 5 in 2-byte elements: up is not aligned, down is.
    layout = BundleLayout(hidden=5, intermediate=3, format="bf16", has_bias=True)
    assert {name: part.offset for name, part in layout.components.items()} == {
        "gate": 0, "up": 30, "down": 64, "gate_bias": 128, "up_bias": 134, "down_bias": 192,
    }  # fmt: skip
    assert layout.payload_nbytes == 3 * 30 + 2 * 6 + 10
    assert layout.nbytes == 4096


def test_a_known_packed_layout() -> None:
    # 3 x 5 and 5 x 3 are one tile of 16 x 64 each.
    layout = BundleLayout(hidden=5, intermediate=3, format="int4", has_bias=True)
    assert {name: part.offset for name, part in layout.components.items()} == {
        "gate": 0, "up": 512, "down": 1024, "gate_scale": 1536, "up_scale": 1600, "down_scale": 1664,
        "gate_bias": 1728, "up_bias": 1740, "down_bias": 1792,
    }  # fmt: skip
    assert layout.nbytes == 4096
    assert layout.safetensors_dtype == "U8"
    assert layout.matrix("down").codes_nbytes == 512
    with pytest.raises(ValueError, match="packed format"):
        _ = layout.element


def test_every_format_is_packed_or_not() -> None:
    for format in EXPERT_FORMATS:
        assert BundleLayout(8, 8, format).is_packed == (format in PACKED_FORMATS) == (format not in ELEMENT_FORMATS)


@settings(deadline=None)
@given(st.integers(0, 2**60), st.integers(1, 2**20))
def test_round_up_is_the_least_multiple(value: int, multiple: int) -> None:
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert value <= rounded < value + multiple


@pytest.mark.parametrize("sizes", [(0, 8), (8, 0), (-1, 8), (8, -3)])
def test_an_expert_without_weights_is_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="has no weights"):
        BundleLayout(*sizes, format="bf16")


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'bf15'.*bf16, fp16, fp32"):
        BundleLayout(8, 8, "bf15")
