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
from cpu_kernels.jit import intrinsic
from cpu_kernels.packed_simd import PackedCode
from formats.packed import COLUMN_BLOCK, TILE_ROWS

_Codegen = Callable[[Any, Any, Any, Any], Any]
_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_CACHE_LINE_BYTES = 64


@dataclass(frozen=True)
class Tokens:
    """How many tokens a tile serves; a compile-time constant in kernels."""

    count: int


class PackedCodeType(types.Type):
    """Numba's type of a `PackedCode`: one type per value."""

    def __init__(self, code: PackedCode) -> None:
        self.code = code
        super().__init__(name=f"PackedCode({code.format}, {code.isa}, {code.stamp})")


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


def _row(builder: Any, table: Any, index: int) -> Any:
    return simd.load(builder, table, _I64, 8 * index)


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

        def at(base: Any, nbytes: int, index: Any) -> Any:
            return builder.add(base, builder.mul(index, ir.Constant(_I64, nbytes)))

        if kernel.format == "fp8_e4m3":
            blocks_per_scale = kernel.packed.group // COLUMN_BLOCK
            scale = at(scales, 4, builder.udiv(block, ir.Constant(_I64, blocks_per_scale)))
        else:
            scale = at(scales, kernel.scales_nbytes, block)
        activations = simd.BLOCK_NBYTES[kernel.activation]
        rows = [at(_row(builder, inputs, token), activations, block) for token in range(tile.count)]
        totals = [builder.extract_value(tile_value, token) for token in range(tile.count)]
        totals = simd.add_block(builder, kernel, totals, at(codes, kernel.codes_nbytes, block), scale, rows)
        for token, total in enumerate(totals):
            tile_value = builder.insert_value(tile_value, total, token)
        return tile_value

    return tile(code, tile, types.int64, types.int64, types.int64, types.int64), codegen


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


@intrinsic
def prefetch_codes(typingctx: Any, code: Any, address: Any) -> tuple[Any, _Codegen]:
    """Ask for as many bytes as the codes of a block have; they need not exist."""
    kernel: PackedCode = code.code

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flags = [ir.Constant(_I32, flag) for flag in (0, 3, 1)]
        for line in range(0, kernel.codes_nbytes, _CACHE_LINE_BYTES):
            at = builder.add(arguments[1], ir.Constant(_I64, line))
            simd.call(builder, "llvm.prefetch.p0", ir.VoidType(), builder.inttoptr(at, _I8.as_pointer()), *flags)
        return context.get_dummy_value()

    return types.void(code, types.int64), codegen


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
