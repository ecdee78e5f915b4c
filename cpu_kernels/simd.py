# mypy: allow-untyped-calls
"""Vector registers for Numba: tiles of dot products over the rows of a row-major matrix in memory.

A dot product is taken in steps of 64 bytes by four chains of 16 fp32 lanes: step i of the first 4 * (steps // 4)
goes to chain i mod 4, the steps that are left go to chain 0. Within a lane a step adds two products (16-bit formats)
or one (fp32). At the end the chains are added, ((0 + 1) + 2) + 3, and the 16 lanes as a binary tree. Every tile keeps
this order, so a dot product has the same bits in a tile of any shape: results depend neither on how many tokens share
an expert nor on how rows are split. Four chains hide the latency of the additions when one row is read at a time,
which is what the prefetchers of CPUs follow best.

Error of one dot product of length n, with u = 2**-24 and S = sum |w_i x_i|:
    |computed - exact| <= (n / 64 + 12) u S
Products of 16-bit elements are exact in fp32. VDPBF16PS (`avx512_bf16`) also reads denormal bf16 inputs as zero
and flushes denormal results: this adds at most n 2**-126 (1 + max|w| + max|x|).

Addresses are int64. Nothing outside the stated rows is read: the last part of a row is loaded under a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_constant
from numba.extending import models, register_model, typeof_impl

from cpu_kernels.cache_lines import prefetch
from cpu_kernels.isa import Isa
from cpu_kernels.jit import intrinsic

LANES = 16
STEP_BYTES = 64
CHAINS = 4

_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()
_F32X16 = ir.VectorType(_F32, LANES)
_I32X16 = ir.VectorType(_I32, LANES)


class _BFloatType(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloatType)

    def __hash__(self) -> int:
        return hash(_BFloatType)


BF16X32 = ir.VectorType(_BFloatType(), 2 * LANES)


@dataclass(frozen=True)
class Elements:
    """How the elements of a format are loaded and multiplied on an ISA; a compile-time constant in kernels.

    Attributes:
        format: name of the element format: bf16, fp16 or fp32.
        isa: the instructions used.
    """

    format: str
    isa: Isa

    @property
    def per_step(self) -> int:
        """Elements in 64 bytes."""
        return LANES if self.format == "fp32" else 2 * LANES


@dataclass(frozen=True)
class TileShape:
    """Weight rows x input rows x chains of a tile; a compile-time constant in kernels."""

    rows: int
    tokens: int
    chains: int


class ElementsType(types.Type):
    """Numba's type of an `Elements`: one type per value."""

    def __init__(self, elements: Elements) -> None:
        self.elements = elements
        super().__init__(name=f"Elements({elements.format}, {elements.isa})")


class TileShapeType(types.Type):
    """Numba's type of a `TileShape`: one type per value."""

    def __init__(self, shape: TileShape) -> None:
        self.shape = shape
        super().__init__(name=f"TileShape({shape.rows}, {shape.tokens}, {shape.chains})")


class TileType(types.Type):
    """Numba's type of a tile's accumulators, held in registers; ordered by chain, row, token."""

    def __init__(self, shape: TileShape) -> None:
        self.shape = shape
        super().__init__(name=f"Tile({shape.rows}, {shape.tokens}, {shape.chains})")


@typeof_impl.register(Elements)
def _typeof_elements(value: Elements, context: Any) -> ElementsType:
    return ElementsType(value)


@typeof_impl.register(TileShape)
def _typeof_tile_shape(value: TileShape, context: Any) -> TileShapeType:
    return TileShapeType(value)


register_model(ElementsType)(models.OpaqueModel)
register_model(TileShapeType)(models.OpaqueModel)


@lower_constant(ElementsType)
@lower_constant(TileShapeType)
def _lower_compile_time_constant(context: Any, builder: Any, ty: Any, value: Any) -> Any:
    return context.get_dummy_value()


@register_model(TileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: TileType) -> None:
        shape = fe_type.shape
        super().__init__(dmm, fe_type, ir.ArrayType(_F32X16, shape.rows * shape.tokens * shape.chains))


# --- pieces of LLVM code ---


def pointer_to(builder: Any, address: Any, pointee: Any) -> Any:
    """Code: an address as a pointer to values of an LLVM type."""
    return builder.inttoptr(address, pointee.as_pointer())


def _splat_i32(value: int) -> Any:
    return ir.Constant(_I32X16, [value] * LANES)


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def _load_step(builder: Any, address: Any, elements: Elements, count: Any | None) -> Any:
    """64 bytes as stored; with `count`, only the first `count` elements, the others zero."""
    width = elements.per_step
    element = _F32 if elements.format == "fp32" else _I16
    vector = ir.VectorType(element, width)
    if count is None:
        return builder.load(pointer_to(builder, address, vector), align=1)
    first = builder.insert_element(ir.Constant(ir.VectorType(_I32, width), ir.Undefined), count, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, width), [0] * width)
    counts = builder.shuffle_vector(first, ir.Constant(first.type, ir.Undefined), zeros)
    mask = builder.icmp_unsigned("<", ir.Constant(ir.VectorType(_I32, width), list(range(width))), counts)
    suffix = f"v{width}{'f32' if elements.format == 'fp32' else 'i16'}"
    arguments = [pointer_to(builder, address, vector), ir.Constant(_I32, 1), mask, ir.Constant(vector, None)]
    return _call(builder, f"llvm.masked.load.{suffix}.p0", vector, arguments)


def _widen(builder: Any, raw: Any, elements: Elements) -> list[Any]:
    """The elements of one step as vectors of 16 fp32, in an order that is the same for weights and inputs."""
    if elements.format == "fp32":
        return [raw]
    if elements.format == "bf16":
        pairs = builder.bitcast(raw, _I32X16)
        odd = builder.and_(pairs, _splat_i32(0xFFFF0000))
        even = builder.shl(pairs, _splat_i32(16))
        return [builder.bitcast(odd, _F32X16), builder.bitcast(even, _F32X16)]
    halves = []
    for half in range(2):
        lanes = ir.Constant(_I32X16, list(range(half * LANES, (half + 1) * LANES)))
        part = builder.shuffle_vector(raw, ir.Constant(raw.type, ir.Undefined), lanes)
        halves.append(builder.fpext(builder.bitcast(part, ir.VectorType(_F16, LANES)), _F32X16))
    return halves


def _operand(builder: Any, raw: Any, elements: Elements) -> Any:
    if elements.isa == "avx512_bf16" and elements.format == "bf16":
        return builder.bitcast(raw, BF16X32)
    return _widen(builder, raw, elements)


def _dot_step(builder: Any, elements: Elements, accumulator: Any, weight: Any, value: Any) -> Any:
    if elements.isa == "avx512_bf16" and elements.format == "bf16":
        return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _F32X16, [accumulator, weight, value])
    for w, x in zip(weight, value, strict=True):
        accumulator = _call(builder, "llvm.fma.v16f32", _F32X16, [w, x, accumulator])
    return accumulator


def _sum_lanes(builder: Any, vector: Any) -> Any:
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        index = ir.VectorType(_I32, lanes)
        low = builder.shuffle_vector(vector, undefined, ir.Constant(index, list(range(lanes))))
        high = builder.shuffle_vector(vector, undefined, ir.Constant(index, list(range(lanes, 2 * lanes))))
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, ir.Constant(_I32, 0))


def _row_address(builder: Any, table: Any, index: int) -> Any:
    return builder.load(pointer_to(builder, builder.add(table, ir.Constant(_I64, 8 * index)), _I64))


def _add_dots(
    builder: Any, elements: Elements, shape: TileShape, chain: int, arguments: Any, count: Any | None = None
) -> Any:
    tile, weights, row_bytes, inputs, offset = arguments
    values = []
    for token in range(shape.tokens):
        address = builder.add(_row_address(builder, inputs, token), offset)
        values.append(_operand(builder, _load_step(builder, address, elements, count), elements))
    row_address = builder.add(weights, offset)
    for row in range(shape.rows):
        weight = _operand(builder, _load_step(builder, row_address, elements, count), elements)
        row_address = builder.add(row_address, row_bytes)
        for token in range(shape.tokens):
            index = (chain * shape.rows + row) * shape.tokens + token
            accumulator = builder.extract_value(tile, index)
            accumulator = _dot_step(builder, elements, accumulator, weight, values[token])
            tile = builder.insert_value(tile, accumulator, index)
    return tile


# --- what kernels call ---

_Codegen = Callable[[Any, Any, Any, Any], Any]


@intrinsic
def tile_zero(typingctx: Any, shape: Any) -> tuple[Any, _Codegen]:
    """A tile of `shape` with all sums zero."""
    tile = TileType(shape.shape)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(context.get_value_type(tile), None)

    return tile(shape), codegen


@intrinsic
def tile_dot(
    typingctx: Any, elements: Any, tile: Any, weights: Any, row_bytes: Any, inputs: Any, offset: Any
) -> tuple[Any, _Codegen]:
    """Add to chain 0 the products of one step of every weight row with one step of every input row.

    elements: the format and how it is multiplied. tile: the sums so far.
    weights: address of the tile's first weight row, row_bytes before the next.
    inputs: address of a table of int64, the address of each input row.
    offset: bytes from the start of all rows, of weights and inputs.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _add_dots(builder, elements.elements, tile.shape, 0, arguments[1:])

    return tile(elements, tile, types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def tile_dot_chains(
    typingctx: Any, elements: Any, tile: Any, weights: Any, row_bytes: Any, inputs: Any, offset: Any
) -> tuple[Any, _Codegen]:
    """As `tile_dot` for as many consecutive steps as the tile has chains, one step to each chain."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_value, weights, row_bytes, inputs, offset = arguments[1:]
        for chain in range(tile.shape.chains):
            at = builder.add(offset, ir.Constant(_I64, chain * STEP_BYTES))
            operands = (tile_value, weights, row_bytes, inputs, at)
            tile_value = _add_dots(builder, elements.elements, tile.shape, chain, operands)
        return tile_value

    return tile(elements, tile, types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def tile_dot_tail(
    typingctx: Any, elements: Any, tile: Any, weights: Any, row_bytes: Any, inputs: Any, offset: Any, count: Any
) -> tuple[Any, _Codegen]:
    """As `tile_dot` for the last `count` elements of the rows, fewer than a step has."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        count = builder.trunc(arguments[6], _I32)
        return _add_dots(builder, elements.elements, tile.shape, 0, arguments[1:6], count)

    return tile(elements, tile, types.int64, types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def tile_add(typingctx: Any, tile: Any, other: Any) -> tuple[Any, _Codegen]:
    """The sum of two tiles of one shape."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total, other = arguments
        for index in range(tile.shape.rows * tile.shape.tokens * tile.shape.chains):
            pair = (builder.extract_value(value, index) for value in (total, other))
            total = builder.insert_value(total, builder.fadd(*pair), index)
        return total

    return tile(tile, tile), codegen


@intrinsic
def tile_store(typingctx: Any, tile: Any, outputs: Any, offset: Any) -> tuple[Any, _Codegen]:
    """Write each dot product as fp32: weight row r of token t goes to address outputs[t] + offset + 4 r.

    outputs: address of a table of int64, the address of each token's output row.
    offset: bytes from the start of all output rows.
    """
    shape = tile.shape

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, table, start = arguments
        for token in range(shape.tokens):
            address = builder.add(_row_address(builder, table, token), start)
            for row in range(shape.rows):
                index = row * shape.tokens + token
                total = builder.extract_value(value, index)
                for _ in range(1, shape.chains):
                    index += shape.rows * shape.tokens
                    total = builder.fadd(total, builder.extract_value(value, index))
                target = builder.add(address, ir.Constant(_I64, 4 * row))
                builder.store(_sum_lanes(builder, total), pointer_to(builder, target, _F32), align=4)
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64), codegen


@intrinsic
def prefetch_four_lines(typingctx: Any, address: Any) -> tuple[Any, _Codegen]:
    """Ask for 256 bytes, which need not exist."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for line in range(4):
            prefetch(builder, builder.add(arguments[0], ir.Constant(_I64, line * STEP_BYTES)))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def has_many_registers(typingctx: Any, elements: Any) -> tuple[Any, _Codegen]:
    """Whether the sums of four tokens in `CHAINS` chains stay in registers, as a constant."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(1), elements.elements.isa == "avx512_bf16")

    return types.boolean(elements), codegen


@intrinsic
def elements_per_step(typingctx: Any, elements: Any) -> tuple[Any, _Codegen]:
    """Elements in 64 bytes, as a constant."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_I64, elements.elements.per_step)

    return types.int64(elements), codegen


def storage_type(elements: Elements) -> Any:
    """Numba's type of one stored element: bf16 and fp16 as their bits."""
    return types.float32 if elements.format == "fp32" else types.uint16


@intrinsic
def element_pointer(typingctx: Any, elements: Any, address: Any) -> tuple[Any, _Codegen]:
    """The address as a pointer to stored elements."""
    pointer = types.CPointer(storage_type(elements.elements))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[1], context.get_value_type(pointer))

    return pointer(elements, types.int64), codegen


@intrinsic
def float32_pointer(typingctx: Any, address: Any) -> tuple[Any, _Codegen]:
    """The address as a pointer to fp32."""
    pointer = types.CPointer(types.float32)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64), codegen


@intrinsic
def int64_pointer(typingctx: Any, address: Any) -> tuple[Any, _Codegen]:
    """The address as a pointer to int64."""
    pointer = types.CPointer(types.int64)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64), codegen


@intrinsic
def element_to_float32(typingctx: Any, elements: Any, stored: Any) -> tuple[Any, _Codegen]:
    """One stored element as fp32; exact."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = arguments[1]
        if elements.elements.format == "fp32":
            return bits
        if elements.elements.format == "fp16":
            return builder.fpext(builder.bitcast(bits, _F16), _F32)
        return builder.bitcast(builder.shl(builder.zext(bits, _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(elements, storage_type(elements.elements)), codegen


@intrinsic
def float32_to_element(typingctx: Any, elements: Any, value: Any) -> tuple[Any, _Codegen]:
    """fp32 rounded to the nearest stored element, ties to even; a NaN stays a NaN."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[1]
        if elements.elements.format == "fp32":
            return value
        if elements.elements.format == "fp16":
            return builder.bitcast(builder.fptrunc(value, _F16), _I16)
        bits = builder.bitcast(value, _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(_I32, 0x7FFF)), odd)
        quiet = builder.or_(bits, ir.Constant(_I32, 0x00400000))
        is_nan = builder.fcmp_unordered("uno", value, value)
        chosen = builder.select(is_nan, quiet, rounded)
        return builder.trunc(builder.lshr(chosen, ir.Constant(_I32, 16)), _I16)

    return storage_type(elements.elements)(elements, types.float32), codegen


@intrinsic
def float32_from_bits(typingctx: Any, bits: Any) -> tuple[Any, _Codegen]:
    """The fp32 value with these bits."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _F32)

    return types.float32(types.int32), codegen
