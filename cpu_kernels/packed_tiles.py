# mypy: allow-untyped-calls
"""The blocks of `packed_simd` as functions that Numba kernels call: tiles of 16 rows by a few tokens in registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.imputils import lower_constant
from numba.extending import models, register_model, typeof_impl

from cpu_kernels import packed_simd as simd
from cpu_kernels.cache_lines import prefetch
from cpu_kernels.jit import intrinsic, stack_room
from cpu_kernels.packed_simd import PackedCode
from formats.packed import COLUMN_BLOCK, TILE_ROWS

_Codegen = Callable[[Any, Any, Any, Any], Any]
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_CACHE_LINE_BYTES = 64

# How far ahead to ask for codes: about the bytes that arrive in the latency of memory. Eight tokens pass a block of 8
# bits about as fast as it arrives, so any that comes late holds them up: they ask earlier.
_PREFETCH_BYTES = 4096
_EARLY_PREFETCH_BYTES = 8192


@dataclass(frozen=True)
class Tokens:
    """How many tokens a tile serves; a compile-time constant in kernels."""

    count: int


class PackedCodeType(types.Type):
    """Numba's type of a `PackedCode`: one type per value."""

    def __init__(self, code: PackedCode) -> None:
        self.code = code
        super().__init__(name=f"PackedCode({code.format}, {code.isa})")


class TokensType(types.Type):
    """Numba's type of a `Tokens`: one type per value."""

    def __init__(self, tokens: Tokens) -> None:
        self.count = tokens.count
        super().__init__(name=f"Tokens({tokens.count})")


class PackedTileType(types.Type):
    """Numba's type of the fp32 sums of 16 rows for some tokens."""

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(name=f"PackedTile({count})")


@typeof_impl.register(PackedCode)
def _typeof_code(value: PackedCode, context: Any) -> PackedCodeType:
    return PackedCodeType(value)


@typeof_impl.register(Tokens)
def _typeof_tokens(value: Tokens, context: Any) -> TokensType:
    return TokensType(value)


register_model(PackedCodeType)(models.OpaqueModel)
register_model(TokensType)(models.OpaqueModel)


@lower_constant(PackedCodeType)
@lower_constant(TokensType)
def _lower_compile_time_constant(context: Any, builder: Any, ty: Any, value: Any) -> Any:
    return context.get_dummy_value()


@register_model(PackedTileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: PackedTileType) -> None:
        super().__init__(dmm, fe_type, ir.ArrayType(simd.F32_ROWS, fe_type.count))


def _at(builder: Any, base: Any, nbytes: int, index: Any) -> Any:
    return builder.add(base, builder.mul(index, ir.Constant(_I64, nbytes)))


def _row(builder: Any, table: Any, index: int) -> Any:
    return simd.load(builder, table, _I64, 8 * index)


def _scales_of_block(builder: Any, code: PackedCode, scales: Any, block: Any) -> Any:
    if code.format == "fp8_e4m3":
        return _at(builder, scales, 4, builder.udiv(block, ir.Constant(_I64, code.packed.group // COLUMN_BLOCK)))
    return _at(builder, scales, code.scales_nbytes, block)


def _add_to_tile(
    builder: Any,
    code: PackedCode,
    tile: Any,
    count: int,
    inputs: Any,
    block: Any,
    add: Callable[[list[Any], list[Any]], list[Any]],
) -> Any:
    """The tile after `add`, which is given its sums and the addresses of each token's activations of the block."""
    activations = simd.BLOCK_NBYTES[code.activation]
    rows = [_at(builder, _row(builder, inputs, token), activations, block) for token in range(count)]
    totals = add([builder.extract_value(tile, token) for token in range(count)], rows)
    for token, total in enumerate(totals):
        tile = builder.insert_value(tile, total, token)
    return tile


@intrinsic
def packed_zero(typingctx: Any, tokens: Any) -> tuple[Any, _Codegen]:
    """A tile of zeros."""
    tile = PackedTileType(tokens.count)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(context.get_value_type(tile), None)

    return tile(tokens), codegen


@intrinsic
def packed_block(
    typingctx: Any, code: Any, tile: Any, codes: Any, scales: Any, inputs: Any, block: Any
) -> tuple[Any, _Codegen]:
    """Add the products of 64 columns of 16 rows with each token's activations.

    codes, scales: addresses of those of the tile's first block. inputs: address of a table of int64, the address of
    each token's first block of activations. block: number of the block.
    """
    kernel: PackedCode = code.code

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, tile_value, codes, scales, inputs, block = arguments
        codes_of_block = _at(builder, codes, kernel.codes_nbytes, block)
        scale = _scales_of_block(builder, kernel, scales, block)

        def add(totals: list[Any], rows: list[Any]) -> list[Any]:
            return simd.add_block(builder, kernel, totals, codes_of_block, scale, rows)

        return _add_to_tile(builder, kernel, tile_value, tile.count, inputs, block, add)

    return tile(code, tile, types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def packed_widen(typingctx: Any, code: Any, codes: Any, scales: Any, widened: Any, block: Any) -> tuple[Any, _Codegen]:
    """Write a block of fp8 as fp32 to an address.

    codes, scales, block: as for `packed_block`. widened: address of `widened_nbytes`.
    """
    kernel: PackedCode = code.code

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, codes, scales, widened, block = arguments
        if kernel.widened_nbytes:
            scale = _scales_of_block(builder, kernel, scales, block)
            simd.widen_block(builder, _at(builder, codes, kernel.codes_nbytes, block), scale, widened)
        return context.get_dummy_value()

    return types.void(code, types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def widened_block(typingctx: Any, code: Any, tile: Any, widened: Any, inputs: Any, block: Any) -> tuple[Any, _Codegen]:
    """As `packed_block`, of a block that `packed_widen` wrote; the same bits."""
    kernel: PackedCode = code.code

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, tile_value, widened, inputs, block = arguments

        def add(totals: list[Any], rows: list[Any]) -> list[Any]:
            return simd.add_widened_block(builder, totals, widened, rows) if kernel.widened_nbytes else totals

        return _add_to_tile(builder, kernel, tile_value, tile.count, inputs, block, add)

    return tile(code, tile, types.int64, types.int64, types.int64), codegen


@intrinsic
def tile_load(typingctx: Any, tokens: Any, address: Any) -> tuple[Any, _Codegen]:
    """The sums that `tile_keep` wrote."""
    tile = PackedTileType(tokens.count)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = ir.Constant(context.get_value_type(tile), ir.Undefined)
        for token in range(tile.count):
            sums = simd.load(builder, arguments[1], simd.F32_ROWS, 4 * TILE_ROWS * token)
            value = builder.insert_value(value, sums, token)
        return value

    return tile(tokens, types.int64), codegen


@intrinsic
def tile_keep(typingctx: Any, tile: Any, address: Any) -> tuple[Any, _Codegen]:
    """Write a tile's sums as they are, 64 bytes for each token."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for token in range(tile.count):
            at = builder.add(arguments[1], ir.Constant(_I64, 4 * TILE_ROWS * token))
            target = builder.inttoptr(at, simd.F32_ROWS.as_pointer())
            builder.store(builder.extract_value(arguments[0], token), target, align=1)
        return context.get_dummy_value()

    return types.void(tile, types.int64), codegen


@intrinsic
def widened_scratch(typingctx: Any, code: Any, blocks: Any, tokens: Any) -> tuple[Any, _Codegen]:
    """Address on the stack of room for blocks.count widened blocks, then for the sums of tokens.count tokens."""
    nbytes = blocks.count * code.code.widened_nbytes + 4 * TILE_ROWS * tokens.count

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return stack_room(builder, nbytes, _CACHE_LINE_BYTES)

    return types.int64(code, blocks, tokens), codegen


@intrinsic
def packed_store(typingctx: Any, code: Any, tile: Any, outputs: Any, offset: Any, rows: Any) -> tuple[Any, _Codegen]:
    """Write the first `rows` of the 16 sums of each token as fp32 to outputs[token] + offset.

    outputs: address of a table of int64, the address of each token's row of sums. offset: bytes. rows: 1 to 16.
    """
    kernel: PackedCode = code.code

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, tile_value, outputs, offset, rows = arguments
        kind = simd.F32_ROWS
        lanes = ir.Constant(ir.VectorType(_I32, TILE_ROWS), list(range(TILE_ROWS)))
        count = simd.splat(builder, builder.trunc(rows, _I32), TILE_ROWS)
        mask = builder.icmp_unsigned("<", lanes, count)
        whole = builder.icmp_unsigned("==", rows, ir.Constant(_I64, TILE_ROWS))
        for token in range(tile.count):
            value = builder.extract_value(tile_value, token)
            if kernel.output_factor != 1:
                value = builder.fmul(value, simd.constant(kind, kernel.output_factor))
            target = builder.inttoptr(builder.add(_row(builder, outputs, token), offset), kind.as_pointer())
            with builder.if_else(whole) as (all_rows, some_rows):
                with all_rows:
                    builder.store(value, target, align=1)
                with some_rows:
                    alignment = ir.Constant(_I32, 1)
                    simd.call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), value, target, alignment, mask)
        return context.get_dummy_value()

    return types.void(code, tile, types.int64, types.int64, types.int64), codegen


def _constant(name: str, of_code: Callable[[PackedCode], int]) -> Any:
    @intrinsic
    def constant(typingctx: Any, code: Any) -> tuple[Any, _Codegen]:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return ir.Constant(_I64, of_code(code.code))

        return types.int64(code), codegen

    constant.__name__ = name
    return constant


codes_nbytes = _constant("codes_nbytes", lambda code: code.codes_nbytes)
scales_nbytes = _constant("scales_nbytes", lambda code: code.scales_nbytes)
activation_kind = _constant("activation_kind", lambda code: list(simd.BLOCK_NBYTES).index(code.activation))
block_scaled = _constant("block_scaled", lambda code: int(code.packed.group_rows > 1))
most_tokens = _constant("most_tokens", lambda code: code.most_tokens)
widened_nbytes = _constant("widened_nbytes", lambda code: code.widened_nbytes)


@intrinsic
def prefetch_codes(typingctx: Any, code: Any, tokens: Any, address: Any) -> tuple[Any, _Codegen]:
    """Ask for as many bytes as the codes of a block have, some way ahead of one at an address; they need not exist.

    Asking takes four cycles a line, which one token's products with 4 bits do not leave; every other line makes the CPU
    fetch the rest.
    """
    kernel: PackedCode = code.code
    lines = 2 if tokens.count == 1 and kernel.packed.bits == 4 else 1
    ahead = _EARLY_PREFETCH_BYTES if tokens.count == 8 and kernel.format == "int8" else _PREFETCH_BYTES

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for at in range(0, kernel.codes_nbytes, lines * _CACHE_LINE_BYTES):
            prefetch(builder, builder.add(arguments[2], ir.Constant(_I64, ahead + at)))
        return context.get_dummy_value()

    return types.void(code, tokens, types.int64), codegen


@intrinsic
def bits_of_float32(typingctx: Any, value: Any) -> tuple[Any, _Codegen]:
    """The bits of an fp32 value."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I32)

    return types.int32(types.float32), codegen


def _pointer_to(name: str, kind: Any) -> Any:
    @intrinsic
    def pointer(typingctx: Any, address: Any) -> tuple[Any, _Codegen]:
        result = types.CPointer(kind)

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(result))

        return result(types.int64), codegen

    pointer.__name__ = name
    return pointer


int8_pointer = _pointer_to("int8_pointer", types.int8)
int16_pointer = _pointer_to("int16_pointer", types.int16)
int32_pointer = _pointer_to("int32_pointer", types.int32)
