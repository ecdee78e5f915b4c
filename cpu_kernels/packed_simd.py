# mypy: allow-untyped-calls
"""Dot products of packed weights with quantised activations, as LLVM code for each ISA; no Numba here.

The unit is one block: 16 rows by 64 columns of weights, times some tokens. The code of a block has no loops and keeps
its sums in registers. For row n, token t and each group of columns,

    sums[n, t] = sum over the group of (code - offset) * x_code         exact in int32, whatever the order
    part[n, t] = fma(sums[n, t], weight_scale[n], part[n, t])           over the groups of a block, from 0
    acc[n, t]  = fma(part[n, t], x_scale[t], acc[n, t])

so every ISA and every number of tokens gives the same bits. How a block of activations lies is stated in
`activation_quantisation_kernel`. In fp8_e4m3 weights and activations are multiplied as fp32,
    acc[n, t] = fma(sum over the 64 columns in ascending order by fma, weight_scale, acc[n, t]).

`madd_bytes` (AVX2, 4 bits) adds pairs of products in 16 bits: VPMADDUBSW of codes to `largest` with activations to 127
gives at most 254 `largest`, of which 8 (int4, 15) or 5 (mxfp4, 24) can be added before they are widened. With 8-bit
codes it would saturate, so `madd_words` widens codes to 16 bits instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from cpu_kernels.isa import Isa
from formats.packed import COLUMN_BLOCK, PACKED_FORMATS, STEP_BYTES, TILE_ROWS, PackedFormat

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
F32_ROWS = ir.VectorType(_F32, TILE_ROWS)
_I32_ROWS = ir.VectorType(_I32, TILE_ROWS)

# What is subtracted from a code, times what brings it to an integer: mxfp4 becomes 2 value + 12.
OFFSETS = {"int8": 128, "int4": 8, "mxfp4": 12}
_LARGEST = {"int4": 15, "mxfp4": 24}
_MXFP4_TABLE = [12 + doubled for doubled in (0, 1, 2, 3, 4, 6, 8, 12)]
_MXFP4_TABLE += [12 - doubled for doubled in (0, 1, 2, 3, 4, 6, 8, 12)]

_PIECE_BYTES: dict[Isa, int] = {"avx512_vnni": 64, "avx2_vnni": 32, "avx2": 32, "neon_dot": 16, "generic": 64}


@dataclass(frozen=True)
class PackedCode:
    """A packed format on an ISA.

    Attributes:
        format: a key of PACKED_FORMATS.
        isa: the instructions used.
    """

    format: str
    isa: Isa

    @property
    def packed(self) -> PackedFormat:
        """The format."""
        return PACKED_FORMATS[self.format]

    @property
    def codes_nbytes(self) -> int:
        """Bytes of the codes of one block."""
        return TILE_ROWS * COLUMN_BLOCK * self.packed.bits // 8

    @property
    def scales_nbytes(self) -> int:
        """Bytes of the scales of one block, where each row has scales of its own."""
        return TILE_ROWS * COLUMN_BLOCK // self.packed.group * self.packed.scale_nbytes

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest tile whose sums stay in registers: 4, or 8 where there are 32 of 512 bits."""
        return 8 if self.isa == "avx512_vnni" else 4

    @property
    def widened_nbytes(self) -> int:
        """Bytes of a block of fp8 that is widened once for many tokens; 0: other formats gain nothing by it."""
        return 4 * TILE_ROWS * (COLUMN_BLOCK + 1) if self.format == "fp8_e4m3" else 0

    @property
    def activation(self) -> str:
        """How activations lie: a key of BLOCK_NBYTES."""
        if self.format == "fp8_e4m3":
            return "floats"
        element = "words" if self.format == "int8" and self.isa == "avx2" else "bytes"
        return f"{element}_{OFFSETS[self.format]}"

    @property
    def output_factor(self) -> float:
        """What sums are multiplied with at the end."""
        return 0.5 if self.format == "mxfp4" else 1.0


# Bytes of a code and of a block of 64 activations (`activation_quantisation_kernel`), by how they lie: elements and,
# but for floats, the offset of the weights' codes.
CODE_NBYTES = {"bytes_8": 1, "bytes_12": 1, "bytes_128": 1, "words_128": 2, "floats": 4}
BLOCK_NBYTES = {"bytes_8": 80, "bytes_12": 80, "bytes_128": 80, "words_128": 144, "floats": 256}


def vector(element: Any, lanes: int) -> Any:
    """An LLVM vector type."""
    return ir.VectorType(element, lanes)


def load(builder: Any, address: Any, kind: Any, offset: int = 0) -> Any:
    """Read a value at an int64 address, which need not be aligned."""
    at = builder.add(address, ir.Constant(_I64, offset)) if offset else address
    return builder.load(builder.inttoptr(at, kind.as_pointer()), align=1)


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call an LLVM intrinsic."""
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """A vector with one value in all lanes."""
    kind = vector(value.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(vector(_I32, lanes), [0] * lanes))


def constant(kind: Any, value: int | float) -> Any:
    """A vector constant with one value in all lanes."""
    return ir.Constant(kind, [value] * kind.count)


def _concatenate(builder: Any, pieces: list[Any]) -> Any:
    while len(pieces) > 1:
        lanes = 2 * pieces[0].type.count
        order = ir.Constant(vector(_I32, lanes), list(range(lanes)))
        pieces = [builder.shuffle_vector(*pair, order) for pair in zip(pieces[::2], pieces[1::2], strict=True)]
    return pieces[0]


# --- codes to bytes ---


def _look_up(builder: Any, isa: Isa, codes: Any) -> Any:
    """2 value + 12 of e2m1 codes."""
    kind = codes.type
    names = {
        "avx512_vnni": "llvm.x86.avx512.pshuf.b.512",
        "avx2_vnni": "llvm.x86.avx2.pshuf.b",
        "avx2": "llvm.x86.avx2.pshuf.b",
        "neon_dot": "llvm.aarch64.neon.tbl1.v16i8",
    }
    if isa in names:
        return call(builder, names[isa], kind, ir.Constant(kind, _MXFP4_TABLE * (kind.count // 16)), codes)
    magnitude = builder.and_(codes, constant(kind, 7))
    doubled = magnitude
    for above, extra in ((4, 1), (5, 1), (6, 3)):
        more = builder.icmp_unsigned(">", magnitude, constant(kind, above))
        doubled = builder.add(doubled, builder.and_(builder.sext(more, kind), constant(kind, extra)))
    negative = builder.icmp_unsigned(">", codes, constant(kind, 7))
    middle = constant(kind, 12)
    return builder.select(negative, builder.sub(middle, doubled), builder.add(middle, doubled))


def _bytes_of_step(builder: Any, code: PackedCode, raw: Any, *, high_in_place: bool = False) -> list[Any]:
    """Unsigned bytes of columns 0-3 of a step and, with 4 bits, of columns 4-7, these 16-fold if `high_in_place`."""
    if code.packed.bits == 8:
        return [raw]
    low = builder.and_(raw, constant(raw.type, 15))
    if high_in_place:
        return [low, builder.and_(raw, constant(raw.type, 240))]
    # Bytes that are shifted alone become a multiplication of bit matrices on x86-64, in the ports of dot products.
    words = builder.bitcast(raw, vector(_I32, raw.type.count // 4))
    shifted = builder.lshr(words, constant(words.type, 4))
    high = builder.bitcast(builder.and_(shifted, constant(words.type, 0x0F0F0F0F)), raw.type)
    if code.format == "int4":
        return [low, high]
    return [_look_up(builder, code.isa, low), _look_up(builder, code.isa, high)]


# --- integer sums ---


def _in_register(builder: Any, value: Any) -> Any:
    """The value, which the optimiser must have at this point of the program.

    It would otherwise regroup chains of additions by token, and hold all weights of a block at once: 16 registers do
    not.
    """
    kind = ir.FunctionType(value.type, [value.type])
    return builder.asm(kind, "", "=x,0", [value], True)


def _dot_bytes(builder: Any, isa: Isa, total: Any, weights: Any, x: Any) -> Any:
    """total[n] + sum of 4 products of unsigned weights [n][4] with the signed bytes of the int32 x."""
    lanes = total.type.count
    if isa == "generic":
        rows = builder.bitcast(weights, total.type)
        for j in range(4):
            byte = builder.and_(builder.lshr(rows, constant(total.type, 8 * j)), constant(total.type, 255))
            value = builder.ashr(builder.shl(x, ir.Constant(_I32, 24 - 8 * j)), ir.Constant(_I32, 24))
            total = builder.add(total, builder.mul(byte, splat(builder, value, lanes)))
        return total
    values = builder.bitcast(splat(builder, x, lanes), weights.type)
    if isa == "neon_dot":
        return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", total.type, total, weights, values)
    # Until LLVM 21 the intrinsic takes words; later versions accept that form too.
    words = (builder.bitcast(operand, total.type) for operand in (weights, values))
    return call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", total.type, total, *words)


def _keeps_high_nibbles(code: PackedCode, tokens: int) -> bool:
    """Whether high nibbles are multiplied where they stand, as 16 times their code; their sums are divided.

    That takes sums of their own for each token, which many tokens have no registers and no time for.
    """
    return code.format == "int4" and code.isa in ("avx512_vnni", "avx2_vnni") and tokens <= code.most_tokens // 2


def _sums_by_bytes(
    builder: Any, code: PackedCode, codes: Any, inputs: Sequence[Any], starts: Sequence[Any], steps: range
) -> list[Any]:
    nbytes = _PIECE_BYTES[code.isa]
    kind, sums_kind = vector(_I8, nbytes), vector(_I32, nbytes // 4)
    high_in_place = _keeps_high_nibbles(code, len(inputs))
    places = 2 if high_in_place else 1
    # Several chains hide the latency of the dot product where there are few tokens.
    chains = max(1, 8 // len(inputs) // (STEP_BYTES // nbytes) // places)
    zero = ir.Constant(sums_kind, None)
    sums = [[[[zero] * chains for _ in range(places)] for _ in range(STEP_BYTES // nbytes)] for _ in inputs]
    for token, start in enumerate(starts):
        for pieces in sums[token]:
            pieces[0][0] = splat(builder, start, sums_kind.count)
    flip = constant(kind, 0x80)
    turn = 0
    for step in steps:
        parts = []
        for piece in range(STEP_BYTES // nbytes):
            raw = load(builder, codes, kind, step * STEP_BYTES + piece * nbytes)
            parts.append(_bytes_of_step(builder, code, raw, high_in_place=high_in_place))
        for part in range(len(parts[0])):
            for token, address in enumerate(inputs):
                x = load(builder, address, _I32, step * code.packed.step_columns + 4 * part)
                for piece, weights in enumerate(parts):
                    operand = weights[part]
                    if code.isa == "neon_dot" and code.format == "int8":
                        operand = builder.xor(operand, flip)
                    chain = sums[token][piece][part % places]
                    at = turn // places % chains
                    chain[at] = _dot_bytes(builder, code.isa, chain[at], operand, x)
            turn += 1
    totals = []
    for pieces in sums:
        added = []
        for chains_of_places in pieces:
            total, *high = (_added(builder, chain) for chain in chains_of_places)
            for sixteenfold in high:
                total = builder.add(total, builder.ashr(sixteenfold, constant(sums_kind, 4)))
            added.append(total)
        totals.append(_concatenate(builder, added))
    return totals


def _added(builder: Any, chain: list[Any]) -> Any:
    total = chain[0]
    for other in chain[1:]:
        total = builder.add(total, other)
    return total


def _sums_by_madd_bytes(
    builder: Any, code: PackedCode, codes: Any, inputs: Sequence[Any], starts: Sequence[Any], steps: range
) -> list[Any]:
    bytes_kind, words_kind, sums_kind = vector(_I8, 32), vector(_I16, 16), vector(_I32, 8)
    ones = constant(words_kind, 1)
    exact = 32767 // (254 * _LARGEST[code.format]) // 2
    exact = 1 << (exact.bit_length() - 1)
    totals = [[splat(builder, start, sums_kind.count)] * 2 for start in starts]
    for first in range(steps.start, steps.stop, exact):
        words: list[list[Any]] = [[None, None] for _ in inputs]
        for step in range(first, first + exact):
            parts = []
            for piece in range(2):
                raw = load(builder, codes, bytes_kind, step * STEP_BYTES + 32 * piece)
                parts.append(_bytes_of_step(builder, code, raw))
            for part in range(2):
                for token, address in enumerate(inputs):
                    x = load(builder, address, _I32, 8 * step + 4 * part)
                    values = builder.bitcast(splat(builder, x, 8), bytes_kind)
                    for piece in range(2):
                        weights = parts[piece][part]
                        pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", words_kind, weights, values)
                        so_far = words[token][piece]
                        total = pairs if so_far is None else builder.add(so_far, pairs)
                        words[token][piece] = _in_register(builder, total)
        for token in range(len(inputs)):
            for piece in range(2):
                four = call(builder, "llvm.x86.avx2.pmadd.wd", sums_kind, words[token][piece], ones)
                totals[token][piece] = builder.add(totals[token][piece], four)
    return [_concatenate(builder, pieces) for pieces in totals]


def _sums_by_madd_words(
    builder: Any, code: PackedCode, codes: Any, inputs: Sequence[Any], starts: Sequence[Any], steps: range
) -> list[Any]:
    words_kind, sums_kind = vector(_I16, 16), vector(_I32, 8)
    totals = [[splat(builder, start, sums_kind.count)] * 2 for start in starts]
    for step in steps:
        parts = []
        for piece in range(2):
            raw = load(builder, codes, words_kind, step * STEP_BYTES + 32 * piece)
            parts.append((builder.and_(raw, constant(words_kind, 255)), builder.lshr(raw, constant(words_kind, 8))))
        for part in range(2):
            for token, address in enumerate(inputs):
                x = load(builder, address, _I32, 8 * step + 4 * part)
                values = builder.bitcast(splat(builder, x, 8), words_kind)
                for piece in range(2):
                    pairs = call(builder, "llvm.x86.avx2.pmadd.wd", sums_kind, parts[piece][part], values)
                    totals[token][piece] = _in_register(builder, builder.add(totals[token][piece], pairs))
    return [_concatenate(builder, pieces) for pieces in totals]


def integer_sums(
    builder: Any, code: PackedCode, codes: Any, inputs: Sequence[Any], starts: Sequence[Any], steps: range
) -> list[Any]:
    """For each token a start, an i32, plus the sums of code * x_code over some steps of a block, <16 x i32>.

    Starting from what corrects the offset takes no instruction where a load fills all lanes.
    """
    if code.isa != "avx2":
        return _sums_by_bytes(builder, code, codes, inputs, starts, steps)
    if code.packed.bits == 4:
        return _sums_by_madd_bytes(builder, code, codes, inputs, starts, steps)
    return _sums_by_madd_words(builder, code, codes, inputs, starts, steps)


# --- scales and fp32 sums ---


def _weight_scales(builder: Any, code: PackedCode, scales: Any, group: int) -> Any:
    """The 16 rows' scales of a group of a block, as fp32."""
    if code.packed.scale == "bf16":
        raw = load(builder, scales, vector(_I16, TILE_ROWS), 2 * TILE_ROWS * group)
        bits = builder.shl(builder.zext(raw, _I32_ROWS), constant(_I32_ROWS, 16))
        return builder.bitcast(bits, F32_ROWS)
    raw = builder.zext(load(builder, scales, vector(_I8, TILE_ROWS), TILE_ROWS * group), _I32_ROWS)
    bits = builder.shl(raw, constant(_I32_ROWS, 23))
    # e8m0 0 is 2**-127, a denormal fp32; 255 is NaN.
    least = constant(_I32_ROWS, 0x00400000)
    bits = builder.select(builder.icmp_unsigned("<", bits, least), least, bits)
    is_nan = builder.sext(builder.icmp_unsigned("==", raw, constant(_I32_ROWS, 255)), _I32_ROWS)
    return builder.bitcast(builder.or_(bits, is_nan), F32_ROWS)


def _add_scaled_integers(
    builder: Any, code: PackedCode, totals: list[Any], codes: Any, scales: Any, inputs: Sequence[Any]
) -> list[Any]:
    groups = COLUMN_BLOCK // code.packed.group
    steps = COLUMN_BLOCK // code.packed.step_columns // groups
    scale_at = COLUMN_BLOCK * CODE_NBYTES[code.activation]
    corrected = not (code.isa == "neon_dot" and code.format == "int8")
    parts: list[Any] = [None] * len(inputs)
    for group in range(groups):
        correction_at = scale_at + (12 if groups == 1 else 4 + 4 * group)
        starts = [load(builder, row, _I32, correction_at) if corrected else ir.Constant(_I32, 0) for row in inputs]
        sums = integer_sums(builder, code, codes, inputs, starts, range(group * steps, (group + 1) * steps))
        weight_scale = _weight_scales(builder, code, scales, group)
        for token, part in enumerate(parts):
            value = builder.sitofp(sums[token], F32_ROWS)
            if part is None:
                parts[token] = builder.fmul(value, weight_scale)
            else:
                parts[token] = call(builder, "llvm.fma.v16f32", F32_ROWS, value, weight_scale, part)
    for token, address in enumerate(inputs):
        x_scale = splat(builder, load(builder, address, _F32, scale_at), TILE_ROWS)
        totals[token] = call(builder, "llvm.fma.v16f32", F32_ROWS, parts[token], x_scale, totals[token])
    return totals


def _e4m3_to_float(builder: Any, rows: Any, byte: int) -> Any:
    """Byte `byte` of each 32-bit lane, an e4m3fn number, as fp32."""
    top = builder.shl(rows, constant(_I32_ROWS, 24 - 8 * byte))
    bits = builder.and_(builder.ashr(top, constant(_I32_ROWS, 4)), constant(_I32_ROWS, 0x87F00000))
    magnitude = builder.and_(top, constant(_I32_ROWS, 0x7F000000))
    is_nan = builder.icmp_unsigned("==", magnitude, constant(_I32_ROWS, 0x7F000000))
    # The exponent's bias is 7 there and 127 here; denormals come out right as well.
    value = builder.fmul(builder.bitcast(bits, F32_ROWS), constant(F32_ROWS, 2.0**120))
    nan = builder.bitcast(constant(_I32_ROWS, 0x7FC00000), F32_ROWS)
    return builder.select(is_nan, nan, value)


def _floats_of_step(builder: Any, codes: Any, step: int) -> list[Any]:
    rows = load(builder, codes, _I32_ROWS, step * STEP_BYTES)
    return [_e4m3_to_float(builder, rows, byte) for byte in range(4)]


def _add_scaled_floats(
    builder: Any, totals: list[Any], weights_of: Callable[[int], list[Any]], scales: Any, inputs: Sequence[Any]
) -> list[Any]:
    sums = [ir.Constant(F32_ROWS, None)] * len(inputs)
    for step in range(COLUMN_BLOCK // 4):
        for byte, weights in enumerate(weights_of(step)):
            for token, address in enumerate(inputs):
                x = splat(builder, load(builder, address, _F32, 16 * step + 4 * byte), TILE_ROWS)
                sums[token] = call(builder, "llvm.fma.v16f32", F32_ROWS, weights, x, sums[token])
    return [
        call(builder, "llvm.fma.v16f32", F32_ROWS, value, scales, total)
        for value, total in zip(sums, totals, strict=True)
    ]


def add_block(
    builder: Any, code: PackedCode, totals: list[Any], codes: Any, scales: Any, inputs: Sequence[Any]
) -> list[Any]:
    """Add one block's products to the sums of some tokens.

    totals: <16 x float> for each token. codes, scales: addresses of the block's codes and scales.
    inputs: address of each token's block of activations.
    """
    if code.format == "fp8_e4m3":
        scale = splat(builder, load(builder, scales, _F32), TILE_ROWS)
        return _add_scaled_floats(builder, totals, lambda step: _floats_of_step(builder, codes, step), scale, inputs)
    return _add_scaled_integers(builder, code, totals, codes, scales, inputs)


def widen_block(builder: Any, codes: Any, scale: Any, widened: Any) -> None:
    """Write a block of fp8_e4m3 as fp32 to an address, column by column, then its scale 16 times."""

    def put(value: Any, offset: int) -> None:
        at = builder.add(widened, ir.Constant(_I64, offset))
        builder.store(value, builder.inttoptr(at, F32_ROWS.as_pointer()), align=1)

    for step in range(COLUMN_BLOCK // 4):
        for byte, weights in enumerate(_floats_of_step(builder, codes, step)):
            put(weights, 4 * TILE_ROWS * (4 * step + byte))
    put(splat(builder, load(builder, scale, _F32), TILE_ROWS), 4 * TILE_ROWS * COLUMN_BLOCK)


def add_widened_block(builder: Any, totals: list[Any], widened: Any, inputs: Sequence[Any]) -> list[Any]:
    """As `add_block`, of a block that `widen_block` wrote; the same bits."""

    def columns_of(step: int) -> list[Any]:
        return [load(builder, widened, F32_ROWS, 4 * TILE_ROWS * (4 * step + byte)) for byte in range(4)]

    scale = load(builder, widened, F32_ROWS, 4 * TILE_ROWS * COLUMN_BLOCK)
    return _add_scaled_floats(builder, totals, columns_of, scale, inputs)
