# mypy: allow-untyped-calls
"""Code for sums over the rows of panels in integers: codes of int8 and int4 times weights of 16 bits.

Two rows at a time: a word of 32 bits has one lane's codes of both, 16 bits each, which a multiplication of pairs
(VPMADDWD) multiplies with the rows' weights and adds: half as many multiplications as in fp32. Sums are exact, so that
bits do not depend on the instruction set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_constant
from numba.extending import models, register_model, typeof_impl

from cpu_kernels.isa import supports
from cpu_kernels.jit import intrinsic
from cpu_kernels.kv_vectors import PIECE, broadcast, load, offset_by, pick
from cpu_kernels.packing_simd import rows_type

_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_I32X8, _I16X16 = ir.VectorType(_I32, PIECE), ir.VectorType(_I16, 2 * PIECE)


@dataclass(frozen=True)
class PairShape:
    """A tile of sums, a compile-time constant.

    Attributes:
        format: "int8" or "int4".
        heads: rows of weights.
        words: vectors; of int8 those of a panel of 16 lanes or of two panels; of a half panel of int4 2 or 4.
        first: number of the first of these in a half panel of int4.
        chains: sums of each lane that are added at the end, so that one need not wait for another: a power of two
            up to PAIRS_AT_ONCE.
        lanes: of a vector: 8, or 16 of int8 where the CPU multiplies pairs in vectors of 64 bytes.
        pairs: whether the CPU multiplies pairs.
    """

    format: str
    heads: int
    words: int
    first: int = 0
    chains: int = 1
    lanes: int = PIECE
    pairs: bool = field(default_factory=lambda: supports("avx2"))

    @property
    def pair_nbytes(self) -> int:
        """Bytes of two rows of a panel."""
        return 64 if self.format == "int4" else 32


class PairShapeType(types.Type):
    """Numba's type of a `PairShape`: one type per value."""

    def __init__(self, shape: PairShape) -> None:
        self.shape = shape
        super().__init__(name=f"PairShape({shape})")


class PairTileType(types.Type):
    """Numba's type of a tile's int32 sums, ordered by chain, head, then word."""

    def __init__(self, shape: PairShape) -> None:
        self.vectors, self.lanes = shape.chains * shape.heads * shape.words, shape.lanes
        super().__init__(name=f"PairTile({self.vectors}, {self.lanes})")


@typeof_impl.register(PairShape)
def _typeof_shape(value: PairShape, context: Any) -> PairShapeType:
    return PairShapeType(value)


register_model(PairShapeType)(models.OpaqueModel)


@lower_constant(PairShapeType)
def _lower_compile_time_constant(context: Any, builder: Any, ty: Any, value: Any) -> Any:
    return context.get_dummy_value()


@register_model(PairTileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: PairTileType) -> None:
        super().__init__(dmm, fe_type, ir.ArrayType(ir.VectorType(_I32, fe_type.lanes), fe_type.vectors))


def int8_pairs(builder: Any, address: Any, lanes: int = PIECE) -> list[Any]:
    """Two rows of 16 lanes as vectors of pairs, in the order of lanes."""
    codes, pairs = ir.VectorType(_I8, 2 * lanes), ir.VectorType(_I16, 2 * lanes)
    places = range(0, 32, 2 * lanes)
    return [builder.sext(load(builder, offset_by(builder, address, place), codes), pairs) for place in places]


# Of the vectors of `int4_pairs`: what codes are multiplied with, where masking is all that is done.
INT4_FACTORS = (1.0, 16.0, 1.0, 1.0)


def int4_pairs(builder: Any, address: Any, first: int = 0, count: int = 4) -> list[Any]:
    """32 lanes of two rows, 8 lanes to a vector of pairs: `count` (2 or 4) of the four from `first` on."""
    words = load(builder, address, _I16X16)
    low, above_low, eight, twelve = (ir.Constant(_I16X16, [value] * 16) for value in (0x0F, 0xF0, 8, 12))
    pairs = []
    if first == 0:
        pairs += [builder.and_(words, low), builder.and_(words, above_low)]
    if first + count == 4:
        pairs += [builder.and_(builder.lshr(words, eight), low), builder.lshr(words, twelve)]
    return pairs


def _multiply_pairs(builder: Any, shape: PairShape, codes: Any, weights: Any) -> Any:
    """int32 [lanes]: codes[2 i] weights[2 i] + codes[2 i + 1] weights[2 i + 1]."""
    sums = ir.VectorType(_I32, shape.lanes)
    if shape.pairs:
        kind = ir.FunctionType(sums, [codes.type, codes.type])
        name = "llvm.x86.avx2.pmadd.wd" if shape.lanes == PIECE else "llvm.x86.avx512.pmaddw.d.512"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [codes, weights])
    products = []
    for odd in (0, 1):
        lanes = list(range(odd, 2 * shape.lanes, 2))
        wide = [builder.sext(pick(builder, one, one, lanes), sums) for one in (codes, weights)]
        products.append(builder.mul(*wide))
    return builder.add(*products)


@intrinsic
def pairs_zero(typingctx: Any, shape: Any) -> Any:
    """A tile with all sums zero."""
    tile = PairTileType(shape.shape)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(context.get_value_type(tile), None)

    return tile(shape), codegen


# Pairs of rows that are added at a time.
PAIRS_AT_ONCE = 4


@intrinsic
def pairs_add_rows(
    typingctx: Any, shape: Any, tile: Any, rows: Any, panel_nbytes: Any, weights: Any, weights_nbytes: Any
) -> Any:
    """Add eight consecutive rows, each times its weight of each head.

    rows: address of the first panel's first pair, panel_nbytes before the next panel's; of int4 that of its half.
    weights: address of the first head's eight int16 weights of these rows, weights_nbytes before the next head's.
    """
    kernel: PairShape = shape.shape

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, value, rows, panel_nbytes, weights, weights_nbytes = arguments
        for pair in range(PAIRS_AT_ONCE):
            chain = pair % kernel.chains * kernel.heads * kernel.words
            at = offset_by(builder, rows, pair * kernel.pair_nbytes)
            if kernel.format == "int4":
                pieces = int4_pairs(builder, at, kernel.first, kernel.words)
            else:
                pieces = []
                while len(pieces) < kernel.words:
                    pieces += int8_pairs(builder, at, kernel.lanes)
                    at = builder.add(at, panel_nbytes)
            weight = offset_by(builder, weights, 4 * pair)
            for head in range(kernel.heads):
                weights_of_pair = broadcast(builder, load(builder, weight, _I32), kernel.lanes)
                factor = builder.bitcast(weights_of_pair, ir.VectorType(_I16, 2 * kernel.lanes))
                weight = builder.add(weight, weights_nbytes)
                for word, piece in enumerate(pieces):
                    place = chain + head * kernel.words + word
                    total = builder.extract_value(value, place)
                    total = builder.add(total, _multiply_pairs(builder, kernel, piece, factor))
                    value = builder.insert_value(value, total, place)
        return value

    return tile(shape, tile, *[types.int64] * 4), codegen


@intrinsic
def pairs_store(
    typingctx: Any, shape: Any, tile: Any, scales: Any, scales_nbytes: Any, out: Any, out_nbytes: Any, add: Any
) -> Any:
    """Write the sums times their head's scale as fp32, or add them to what is there.

    scales: address of the first head's, fp32, scales_nbytes before the next head's. out: address of the first head's,
    out_nbytes before the next head's. add: bool.
    """
    kernel: PairShape = shape.shape

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, value, scales, scales_nbytes, out, out_nbytes, add = arguments
        sums = [builder.extract_value(value, place) for place in range(tile.vectors)]
        each, numbers = kernel.heads * kernel.words, ir.VectorType(_F32, kernel.lanes)
        while len(sums) > each:
            half = len(sums) // 2
            sums = [builder.add(a, b) for a, b in zip(sums[:half], sums[half:], strict=True)]
        for head in range(kernel.heads):
            scale = broadcast(builder, load(builder, scales, _F32), kernel.lanes)
            scales = builder.add(scales, scales_nbytes)
            for word in range(kernel.words):
                number = builder.sitofp(sums[head * kernel.words + word], numbers)
                times = INT4_FACTORS[kernel.first + word] if kernel.format == "int4" else 1
                if times != 1:
                    number = builder.fmul(number, ir.Constant(numbers, [1 / times] * kernel.lanes))
                at = builder.inttoptr(offset_by(builder, out, 4 * kernel.lanes * word), numbers.as_pointer())
                before = builder.select(add, builder.load(at, align=4), ir.Constant(numbers, None))
                builder.store(builder.fadd(before, builder.fmul(number, scale)), at, align=4)
            out = builder.add(out, out_nbytes)
        return context.get_dummy_value()

    return types.void(shape, tile, *[types.int64] * 4, types.boolean), codegen


@intrinsic
def store_rounded(typingctx: Any, address: Any, rows: Any, factor: Any) -> Any:
    """Write 16 fp32 times a factor, rounded to the nearest int16, which they must fit; of a NaN it may be any."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, rows, factor = arguments
        kind = ir.FunctionType(rows.type, [rows.type])
        nearest = cgutils.get_or_insert_function(builder.module, kind, "llvm.rint.v16f32")
        undefined = ir.Constant(rows.type, ir.Undefined)
        first = builder.insert_element(undefined, factor, ir.Constant(_I32, 0))
        factors = builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, 16), [0] * 16))
        whole = builder.fptosi(builder.call(nearest, [builder.fmul(rows, factors)]), ir.VectorType(_I32, 16))
        narrow = builder.trunc(whole, _I16X16)
        builder.store(narrow, builder.inttoptr(address, _I16X16.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, rows_type, types.float32), codegen
