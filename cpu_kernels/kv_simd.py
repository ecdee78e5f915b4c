# mypy: allow-untyped-calls
"""Panels of a KV block in vector registers: weighted sums of a panel's rows for a few sets of weights.

A tile is the sums of some heads over some pieces of 8 or 16 lanes, all in registers. Row after row is loaded, widened
to fp32 and added with one fused multiply-add a head, so a sum has one order whatever the tile's shape: results do not
depend on how many heads share a panel.

    format      what a lane holds
    fp32 fp16 bf16   the number
    fp8_e4m3         the number / 256: its bits, moved, are those of an fp16 number

int8 and int4 are widened here too, and multiplied in `kv_pairs_simd`.

Addresses are int64. Nothing outside the stated rows is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from struct import pack, unpack
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_constant
from numba.extending import models, register_model, typeof_impl

from cpu_kernels.isa import converts_fp16, looks_up_bytes, vector_registers
from cpu_kernels.jit import intrinsic
from cpu_kernels.kv_pairs_simd import INT4_FACTORS, int4_pairs, int8_pairs
from cpu_kernels.kv_vectors import PIECE, broadcast, load, offset_by, pick, splat
from formats.kv import PAIRED_FORMATS

FP8_FACTOR = 256.0
_Codegen = Callable[[Any, Any, Any, Any], Any]
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()
_F32X8, _I32X8 = ir.VectorType(_F32, PIECE), ir.VectorType(_I32, PIECE)


@dataclass(frozen=True)
class KvCode:
    """A format of KV blocks as kernels are compiled for it; a compile-time constant in them.

    Attributes:
        format: one of `formats.kv.KV_FORMATS`.
        halves: whether the CPU widens fp16.
        registers: how many vector registers tiles may fill, 16 or 32.
        tables: whether the CPU looks 64 bytes up at a time.
    """

    format: str
    halves: bool = field(default_factory=converts_fp16)
    registers: int = field(default_factory=vector_registers)
    tables: bool = field(default_factory=looks_up_bytes)

    @property
    def looks_up(self) -> bool:
        """Whether four rows are widened at a time, by tables."""
        return self.tables and self.format == "fp8_e4m3"

    def lanes(self, heads: int) -> int:
        """Lanes of a tile's vectors.

        Twice as many are half as many instructions and half as many sums that do not wait for each other: from four
        heads on they pay. What comes out of tables fills them anyway.
        """
        return 2 * PIECE if self.looks_up or (self.registers == 32 and heads >= 4) else PIECE

    @property
    def has_token_scales(self) -> bool:
        """Whether a token's codes share a scale of fp32."""
        return self.format in ("int8", "fp8_e4m3")

    @property
    def has_pairs(self) -> bool:
        """Whether rows lie in pairs."""
        return self.format in PAIRED_FORMATS

    @property
    def row_nbytes(self) -> int:
        """Bytes of a panel's row."""
        return {"fp32": 64, "fp16": 32, "bf16": 32}.get(self.format, 32 if self.format == "int4" else 16)


@dataclass(frozen=True)
class PanelShape:
    """Heads x panels of a tile, a compile-time constant."""

    heads: int
    panels: int


class KvCodeType(types.Type):
    """Numba's type of a `KvCode`: one type per value."""

    def __init__(self, code: KvCode) -> None:
        self.code = code
        super().__init__(name=str(code))


class PanelShapeType(types.Type):
    """Numba's type of a `PanelShape`: one type per value."""

    def __init__(self, shape: PanelShape) -> None:
        self.shape = shape
        super().__init__(name=f"PanelShape({shape.heads}, {shape.panels})")


class PanelTileType(types.Type):
    """Numba's type of a tile's sums, ordered by head, then piece."""

    def __init__(self, heads: int, pieces: int, lanes: int) -> None:
        self.heads, self.pieces, self.lanes = heads, pieces, lanes
        super().__init__(name=f"PanelTile({heads}, {pieces}, {lanes})")


@typeof_impl.register(KvCode)
def _typeof_code(value: KvCode, context: Any) -> KvCodeType:
    return KvCodeType(value)


@typeof_impl.register(PanelShape)
def _typeof_shape(value: PanelShape, context: Any) -> PanelShapeType:
    return PanelShapeType(value)


register_model(KvCodeType)(models.OpaqueModel)
register_model(PanelShapeType)(models.OpaqueModel)


@lower_constant(KvCodeType)
@lower_constant(PanelShapeType)
def _lower_compile_time_constant(context: Any, builder: Any, ty: Any, value: Any) -> Any:
    return context.get_dummy_value()


def _floats(lanes: int) -> Any:
    return ir.VectorType(_F32, lanes)


@register_model(PanelTileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: PanelTileType) -> None:
        super().__init__(dmm, fe_type, ir.ArrayType(_floats(fe_type.lanes), fe_type.heads * fe_type.pieces))


def _tile_type(code: KvCode, shape: PanelShape) -> PanelTileType:
    lanes = code.lanes(shape.heads)
    return PanelTileType(shape.heads, 16 // lanes * shape.panels, lanes)


def _store(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    function_type = ir.FunctionType(a.type, [a.type] * 3)
    name = f"llvm.fma.v{a.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [a, b, c])


def _fp8_piece(builder: Any, raw: Any, code: KvCode) -> Any:
    """Bytes of e4m3 as numbers / 256."""
    lanes = raw.type.count
    if code.halves:
        kind = ir.VectorType(_I16, lanes)
        moved = builder.shl(builder.sext(raw, kind), splat(kind, 7))
        halves = builder.bitcast(builder.and_(moved, splat(kind, 0xBF80)), ir.VectorType(_F16, lanes))
        return builder.fpext(halves, _floats(lanes))
    words = ir.VectorType(_I32, lanes)
    moved = builder.shl(builder.sext(raw, words), splat(words, 20))
    numbers = builder.bitcast(builder.and_(moved, splat(words, 0x87F00000)), _floats(lanes))
    return builder.fmul(numbers, splat(_floats(lanes), 2.0**112))


def _fp8_tables() -> tuple[list[int], list[int]]:
    """The two bytes of the bf16 number that an e4m3 code without its sign, divided by 256, is."""
    low, high = [], []
    for code in range(128):
        exponent, mantissa = code >> 3, code & 7
        number = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        (bits,) = unpack("<I", pack("<f", number / FP8_FACTOR))
        low.append(bits >> 16 & 0xFF)
        high.append(bits >> 24)
    return low, high


def _fp8_four_rows(builder: Any, address: Any) -> list[Any]:
    """Four rows of 16 bytes of e4m3 as numbers / 256, looked up: a byte of bf16 each time, for all 64."""
    kind = ir.VectorType(_I8, 64)
    codes = load(builder, address, kind)
    low, high = (
        _choose_bytes(builder, ir.Constant(kind, table[:64]), codes, ir.Constant(kind, table[64:]))
        for table in _fp8_tables()
    )
    high = builder.or_(high, builder.and_(codes, splat(kind, 0x80)))
    rows = []
    # Known as a constant this would become an instruction of its own for each row.
    opaque = ir.InlineAsm(ir.FunctionType(_I64, [_I64]), "", "=r,0")
    upper = builder.bitcast(
        builder.call(opaque, [ir.Constant(_I64, 0xCCCC_CCCC_CCCC_CCCC)]), ir.VectorType(ir.IntType(1), 64)
    )
    for row in range(4):
        places = [place for lane in range(16 * row, 16 * row + 16) for place in (0, 0, lane, 64 + lane)]
        numbers = _choose_bytes(builder, low, ir.Constant(kind, places), high)
        numbers = builder.select(upper, numbers, ir.Constant(kind, None))
        rows.append(builder.bitcast(numbers, _floats(16)))
    return rows


def _choose_bytes(builder: Any, first: Any, places: Any, second: Any) -> Any:
    """Bytes of two vectors of 64 by the lowest seven bits of their places."""
    function_type = ir.FunctionType(first.type, [first.type] * 3)
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [first, places, second])


def _row(builder: Any, code: KvCode, address: Any, lanes: int) -> list[Any]:
    """One row of a panel of 16 lanes as pieces; where there are two of bf16, its even and its odd lanes."""
    if code.format == "bf16" and lanes == PIECE:
        pairs = load(builder, address, _I32X8)
        even = builder.shl(pairs, splat(_I32X8, 16))
        odd = builder.and_(pairs, splat(_I32X8, 0xFFFF0000))
        return [builder.bitcast(even, _F32X8), builder.bitcast(odd, _F32X8)]
    pieces = []
    for first in range(0, 16, lanes):
        at = offset_by(builder, address, first * code.row_nbytes // 16)
        if code.format == "fp32":
            pieces.append(load(builder, at, _floats(lanes)))
        elif code.format == "fp16":
            halves = builder.bitcast(load(builder, at, ir.VectorType(_I16, lanes)), ir.VectorType(_F16, lanes))
            pieces.append(builder.fpext(halves, _floats(lanes)))
        elif code.format == "bf16":
            words = ir.VectorType(_I32, lanes)
            bits = builder.zext(load(builder, at, ir.VectorType(_I16, lanes)), words)
            pieces.append(builder.bitcast(builder.shl(bits, splat(words, 16)), _floats(lanes)))
        else:
            pieces.append(_fp8_piece(builder, load(builder, at, ir.VectorType(_I8, lanes)), code))
    return pieces


def _in_lane_order(builder: Any, code: KvCode, pieces: list[Any], lanes: int) -> list[Any]:
    if code.format == "bf16" and lanes == PIECE:
        ordered = []
        for even, odd in zip(pieces[::2], pieces[1::2], strict=True):
            places = [lane // 2 + (lane % 2) * PIECE for lane in range(2 * PIECE)]
            ordered += [pick(builder, even, odd, places[:PIECE]), pick(builder, even, odd, places[PIECE:])]
        return ordered
    return pieces


@intrinsic
def has_many_registers(typingctx: Any, code: Any) -> tuple[Any, _Codegen]:
    """Whether tiles may fill 32 registers, as a constant."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(1), code.code.registers == 32)

    return types.boolean(code), codegen


@intrinsic
def panel_zero(typingctx: Any, code: Any, shape: Any) -> tuple[Any, _Codegen]:
    """A tile with all sums zero."""
    tile = _tile_type(code.code, shape.shape)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(context.get_value_type(tile), None)

    return tile(code, shape), codegen


def _rows_intrinsic(name: str, rows: int) -> Any:
    def operation(
        typingctx: Any,
        code: Any,
        tile: Any,
        panel: Any,
        panel_nbytes: Any,
        weights: Any,
        weights_nbytes: Any,
    ) -> tuple[Any, _Codegen]:
        kernel: KvCode = code.code

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, value, panel, panel_nbytes, weights, weights_nbytes = arguments
            looked_up = []
            if kernel.looks_up and rows == 4:
                at = panel
                for _ in range(tile.pieces):
                    looked_up.append(_fp8_four_rows(builder, at))
                    at = builder.add(at, panel_nbytes)
            for row in range(rows):
                at = offset_by(builder, panel, row * kernel.row_nbytes)
                pieces = [of_panel[row] for of_panel in looked_up]
                while len(pieces) < tile.pieces:
                    pieces += _row(builder, kernel, at, tile.lanes)
                    at = builder.add(at, panel_nbytes)
                weight = offset_by(builder, weights, 4 * row)
                for head in range(tile.heads):
                    factor = broadcast(builder, load(builder, weight, _F32), tile.lanes)
                    weight = builder.add(weight, weights_nbytes)
                    for index, piece in enumerate(pieces):
                        place = head * tile.pieces + index
                        total = builder.extract_value(value, place)
                        total = _multiply_add(builder, piece, factor, total)
                        value = builder.insert_value(value, total, place)
            return value

        return tile(code, tile, *[types.int64] * 4), codegen

    operation.__name__ = operation.__qualname__ = name
    operation.__doc__ = f"""Add {rows} consecutive row(s), each times its weight of each head.

    panel: address of the first panel's row, panel_nbytes before that of the next panel.
    weights: address of the first head's fp32 weight of that row, weights_nbytes before that of the next head.
    """
    return intrinsic(operation)


panel_row = _rows_intrinsic("panel_row", 1)
panel_four_rows = _rows_intrinsic("panel_four_rows", 4)


def _store_intrinsic(name: str, add: bool) -> Any:
    def operation(typingctx: Any, code: Any, tile: Any, out: Any, out_nbytes: Any) -> tuple[Any, _Codegen]:
        kernel: KvCode = code.code

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, value, out, out_nbytes = arguments
            for head in range(tile.heads):
                pieces = [builder.extract_value(value, head * tile.pieces + piece) for piece in range(tile.pieces)]
                for piece, total in enumerate(_in_lane_order(builder, kernel, pieces, tile.lanes)):
                    at = offset_by(builder, out, 4 * tile.lanes * piece)
                    _store(builder, at, builder.fadd(load(builder, at, total.type), total) if add else total)
                out = builder.add(out, out_nbytes)
            return context.get_dummy_value()

        return types.void(code, tile, types.int64, types.int64), codegen

    operation.__name__ = operation.__qualname__ = name
    operation.__doc__ = f"""{"Add the sums to" if add else "Write the sums as"} fp32 in the order of lanes.

    out: address of the first head's, out_nbytes before the next head's.
    """
    return intrinsic(operation)


panel_store = _store_intrinsic("panel_store", False)
panel_add = _store_intrinsic("panel_add", True)


@intrinsic
def expand_rows_at_once(typingctx: Any, code: Any, rows: Any, out: Any, out_nbytes: Any) -> tuple[Any, _Codegen]:
    """Write `rows_at_once` rows of a panel as fp32: numbers, or codes that lack their scales (fp8_e4m3: codes / 256).

    rows: address of the first. out: address of the first's fp32, out_nbytes before the next one's.
    """
    kernel: KvCode = code.code

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, rows, out, out_nbytes = arguments
        if kernel.has_pairs:
            pairs = int8_pairs(builder, rows)
            factors: tuple[float, ...] = (1.0,) * len(pairs)
            if kernel.format == "int4":
                pairs = [*int4_pairs(builder, rows), *int4_pairs(builder, offset_by(builder, rows, 32))]
                factors = INT4_FACTORS * 2
            written = [_codes_of_row(builder, pairs, factors, row) for row in range(2)]
        else:
            written = [_in_lane_order(builder, kernel, _row(builder, kernel, rows, PIECE), PIECE)]
        for pieces in written:
            for index, piece in enumerate(pieces):
                _store(builder, offset_by(builder, out, 4 * PIECE * index), piece)
            out = builder.add(out, out_nbytes)
        return context.get_dummy_value()

    return types.void(code, types.int64, types.int64, types.int64), codegen


def _codes_of_row(builder: Any, pairs: list[Any], factors: tuple[float, ...], row: int) -> list[Any]:
    """The codes of the first or the second row of pairs as fp32."""
    pieces = []
    for pair, factor in zip(pairs, factors, strict=True):
        words, half = builder.bitcast(pair, _I32X8), splat(_I32X8, 16)
        codes = builder.ashr(words if row else builder.shl(words, half), half)
        number = builder.sitofp(codes, _F32X8)
        pieces.append(number if factor == 1 else builder.fmul(number, splat(_F32X8, 1 / factor)))
    return pieces


DOT_TOKENS = 4


def _dot_intrinsic(name: str, heads: int) -> Any:
    def operation(
        typingctx: Any,
        rows: Any,
        panel_nbytes: Any,
        panels: Any,
        queries: Any,
        query_nbytes: Any,
        out: Any,
        out_nbytes: Any,
    ) -> tuple[Any, _Codegen]:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _dot_rows(builder, heads, arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    operation.__name__ = operation.__qualname__ = name
    operation.__doc__ = f"""Dot products of 4 consecutive fp32 rows of panels with {heads} queries, over all panels.

    rows: address of the first row in the first panel, panel_nbytes before that in the next.
    queries: address of fp32 [{heads}][16 panels], query_nbytes apart. out: address of fp32 [{heads}][4], out_nbytes
    apart.
    """
    return intrinsic(operation)


dot_two = _dot_intrinsic("dot_two", 2)
dot_four = _dot_intrinsic("dot_four", 4)


def _dot_rows(builder: Any, heads: int, arguments: Any) -> None:
    rows, panel_nbytes, panels, queries, query_nbytes, out, out_nbytes = arguments
    entry, body, done = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(body)
    builder.position_at_end(body)
    index, at, query = builder.phi(_I64), builder.phi(_I64), builder.phi(_I64)
    sums = [builder.phi(_F32X8) for _ in range(DOT_TOKENS * heads)]
    totals = list(sums)
    for half in range(2):
        factors = [
            load(builder, offset_by(builder, builder.add(query, builder.mul(ir.Constant(_I64, head), query_nbytes)),
                               32 * half), _F32X8)
            for head in range(heads)
        ]  # fmt: skip
        for token in range(DOT_TOKENS):
            row = load(builder, offset_by(builder, at, 64 * token + 32 * half), _F32X8)
            for head in range(heads):
                place = head * DOT_TOKENS + token
                totals[place] = _multiply_add(builder, row, factors[head], totals[place])
    following = builder.add(index, ir.Constant(_I64, 1))
    at_next, query_next = builder.add(at, panel_nbytes), builder.add(query, ir.Constant(_I64, 64))
    builder.cbranch(builder.icmp_signed("<", following, panels), body, done)
    for phi, first, later in (
        (index, ir.Constant(_I64, 0), following),
        (at, rows, at_next),
        (query, queries, query_next),
        *((phi, ir.Constant(_F32X8, None), total) for phi, total in zip(sums, totals, strict=True)),
    ):
        phi.add_incoming(first, entry)
        phi.add_incoming(later, body)
    builder.position_at_end(done)
    for head in range(heads):
        for token in range(DOT_TOKENS):
            _store(builder, offset_by(builder, out, 4 * token), _sum_lanes(builder, totals[head * DOT_TOKENS + token]))
        out = builder.add(out, out_nbytes)


def _sum_lanes(builder: Any, vector: Any) -> Any:
    """Halves added as a binary tree."""
    lanes = PIECE
    while lanes > 1:
        lanes //= 2
        low = pick(builder, vector, vector, list(range(lanes)))
        vector = builder.fadd(low, pick(builder, vector, vector, list(range(lanes, 2 * lanes))))
    return builder.extract_element(vector, ir.Constant(_I32, 0))
