# mypy: allow-untyped-calls
"""Keys that lie token after token in vector registers: dot products of some rows with some queries.

Lanes are channels. A product of a row and a query is summed in 16 lanes, group after group of 16 channels with one
fused multiply-add each, and the lanes as a binary tree: its bits do not depend on the other rows and queries of a tile.
bf16 is widened to fp32; where there is VDPBF16PS, groups have 32 channels and nothing is widened.

Addresses are int64. Nothing outside the stated rows is read.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from cpu_kernels.jit import intrinsic
from cpu_kernels.kv_vectors import load, offset_by, pick
from cpu_kernels.simd import BF16X32, Elements, TileShape

LANES = 16
_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()
_WIDE = Elements("fp32", "generic")
_F32X16 = ir.VectorType(_F32, LANES)
# Which lanes of two vectors are added at each level of the tree, and to those how far on. From the third level on they
# stay in their quarter of a vector, which is cheaper.
_TREE = (
    ([0, 1, 2, 3, 4, 5, 6, 7], 8),
    ([0, 1, 2, 3, 8, 9, 10, 11], 4),
    ([0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29], 2),
    ([0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30], 1),
)


def has_pairs(elements: Elements) -> bool:
    """Whether a group has 32 channels, and queries are bf16 as well."""
    return elements.format == "bf16" and elements.isa == "avx512_bf16"


@intrinsic
def takes_pairs(typingctx: Any, elements: Any) -> Any:
    """`has_pairs`, as a constant."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(1), has_pairs(elements.elements))

    return types.boolean(elements), codegen


def _operand(builder: Any, elements: Elements, address: Any) -> Any:
    """A group of channels at an address as it is multiplied."""
    if has_pairs(elements):
        return load(builder, address, BF16X32)
    if elements.format == "fp32":
        return load(builder, address, _F32X16)
    stored = load(builder, address, ir.VectorType(_I16, LANES))
    if elements.format == "fp16":
        return builder.fpext(builder.bitcast(stored, ir.VectorType(_F16, LANES)), _F32X16)
    words = ir.VectorType(_I32, LANES)
    shifted = builder.shl(builder.zext(stored, words), ir.Constant(words, [16] * LANES))
    return builder.bitcast(shifted, _F32X16)


def _multiply_add(builder: Any, elements: Elements, row: Any, query: Any, total: Any) -> Any:
    name = "llvm.x86.avx512bf16.dpbf16ps.512" if has_pairs(elements) else "llvm.fma.v16f32"
    operands = [total, row, query] if has_pairs(elements) else [row, query, total]
    function_type = ir.FunctionType(_F32X16, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), operands)


def _lane_sums(builder: Any, vectors: list[Any]) -> tuple[Any, list[int]]:
    """(a vector with the sum of the lanes of each of up to 16, halves added, where each one's is)."""
    count = len(vectors)
    places = [4 * (number % 4) + number // 4 for number in range(count)]
    if count == LANES:
        # In another order they come out in this one.
        vectors, places = [vectors[place] for place in places], list(range(LANES))
    for low, distance in _TREE:
        lanes = low if len(low) == LANES else low + [LANES + lane for lane in low]
        vectors = [
            builder.fadd(pick(builder, a, b, lanes), pick(builder, a, b, [lane + distance for lane in lanes]))
            for a, b in zip(vectors[::2], vectors[1::2] + vectors[-1:], strict=False)
        ]
    return vectors[0], places


def _store_sums(builder: Any, vectors: list[Any], rows: int, out: Any, out_nbytes: Any) -> None:
    """The lanes' sums of vectors [queries][rows], out_nbytes from query to query."""
    for first in range(0, len(vectors), rows):
        if first % LANES == 0:
            sums, places = _lane_sums(builder, vectors[first : first + LANES])
        mine = places[first % LANES : first % LANES + rows]
        if mine == list(range(mine[0], mine[0] + rows)):
            part = pick(builder, sums, sums, mine)
            builder.store(part, builder.inttoptr(out, part.type.as_pointer()), align=4)
        else:
            for row, place in enumerate(mine):
                at = builder.inttoptr(offset_by(builder, out, 4 * row), _F32.as_pointer())
                builder.store(builder.extract_element(sums, ir.Constant(_I32, place)), at, align=4)
        out = builder.add(out, out_nbytes)


@intrinsic
def score_tile(
    typingctx: Any,
    elements: Any,
    shape: Any,
    rows: Any,
    row_nbytes: Any,
    groups: Any,
    queries: Any,
    query_nbytes: Any,
    out: Any,
    out_nbytes: Any,
) -> Any:
    """Out[q][r] = row r times query q, for shape.rows consecutive rows and shape.tokens queries.

    rows: address of the first, of whole groups of elements. queries: address of fp32, or of bf16 where `has_pairs`,
    query_nbytes apart. out: address of fp32, out_nbytes from query to query.
    """
    kind, tile = elements.elements, shape.shape

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, rows, row_nbytes, groups, queries, query_nbytes, out, out_nbytes = arguments
        totals = _products(builder, kind, tile, rows, row_nbytes, groups, queries, query_nbytes)
        _store_sums(builder, totals, tile.rows, out, out_nbytes)
        return context.get_dummy_value()

    return types.void(elements, shape, *[types.int64] * 7), codegen


def _products(
    builder: Any, elements: Elements, tile: TileShape, rows: Any, row_nbytes: Any, groups: Any, queries: Any,
    query_nbytes: Any,
) -> list[Any]:  # fmt: skip
    """Sums of 16 lanes for each query and row, over all groups."""
    entry, body, done = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(body)
    builder.position_at_end(body)
    index = builder.phi(_I64)
    sums = [builder.phi(_F32X16) for _ in range(tile.tokens * tile.rows)]
    totals = list(sums)
    step = 64 if has_pairs(elements) or elements.format == "fp32" else 32
    at = builder.add(rows, builder.mul(index, ir.Constant(_I64, step)))
    query = builder.add(queries, builder.mul(index, ir.Constant(_I64, 64)))
    numbers = []
    for _ in range(tile.rows):
        numbers.append(_operand(builder, elements, at))
        at = builder.add(at, row_nbytes)
    of_queries = elements if has_pairs(elements) else _WIDE
    for number in range(tile.tokens):
        factor = _operand(builder, of_queries, query)
        query = builder.add(query, query_nbytes)
        for row in range(tile.rows):
            place = number * tile.rows + row
            totals[place] = _multiply_add(builder, elements, numbers[row], factor, totals[place])
    following = builder.add(index, ir.Constant(_I64, 1))
    builder.cbranch(builder.icmp_signed("<", following, groups), body, done)
    index.add_incoming(ir.Constant(_I64, 0), entry)
    index.add_incoming(following, body)
    for phi, total in zip(sums, totals, strict=True):
        phi.add_incoming(ir.Constant(_F32X16, None), entry)
        phi.add_incoming(total, body)
    builder.position_at_end(done)
    return totals
