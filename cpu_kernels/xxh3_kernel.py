# mypy: allow-untyped-calls, allow-untyped-defs
"""XXH3 with 64 bits of what is longer than 240 bytes, with its own secret and no seed, as compiled code calls it.

After the specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md, "XXH3 algorithm for long inputs"): eight lanes
of 64 bits take stripes of 64 bytes, sixteen of them to a block, and are scrambled after each block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from cpu_kernels.jit import carray, entry, inner, intrinsic, stack_words
from cpu_kernels.simd import int64_pointer

SHORTEST_NBYTES = 241
"""What is shorter is hashed in another way, which is not here."""

_STRIPE_NBYTES = 64
_BLOCK_NBYTES = 1024
_STRIPES = _BLOCK_NBYTES // _STRIPE_NBYTES

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_SCRAMBLE_AT, _LAST_AT, _MERGE_AT = len(_SECRET) - 64, len(_SECRET) - 64 - 7, 11

_P32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_P64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_START = np.array([_P32[2], *_P64[:4], _P32[1], _P64[4], _P32[0]], np.uint64)
_MERGE = np.frombuffer(_SECRET[_MERGE_AT : _MERGE_AT + 64], np.uint64)
_LENGTH_PRIME, _AVALANCHE_PRIME = np.uint64(_P64[0]), np.uint64(0x165667919E3779F9)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)

_I64 = ir.IntType(64)
_LANES = ir.VectorType(_I64, 8)
_Codegen = Callable[[Any, Any, Any, Any], Any]


def _vector(values: Any) -> Any:
    return ir.Constant(_LANES, [ir.Constant(_I64, int(value)) for value in values])


def _secret_at(start: int) -> Any:
    return _vector(np.frombuffer(_SECRET[start : start + 64], np.uint64))


def _stripe(builder: Any, lanes: Any, data: Any, secret: Any) -> Any:
    """Lanes that have taken one stripe."""
    keyed = builder.xor(data, secret)
    product = builder.mul(builder.and_(keyed, _vector([0xFFFFFFFF] * 8)), builder.lshr(keyed, _vector([32] * 8)))
    swapped = ir.Constant(ir.VectorType(ir.IntType(32), 8), [1, 0, 3, 2, 5, 4, 7, 6])
    return builder.add(builder.add(lanes, product), builder.shuffle_vector(data, data, swapped))


def _load(builder: Any, address: Any, offset: int) -> Any:
    place = builder.inttoptr(builder.add(address, ir.Constant(_I64, offset)), _LANES.as_pointer())
    return builder.load(place, align=1)


def _on_lanes(change: Callable[[Any, Any, Any], Any]) -> Any:
    """An intrinsic void(address of the eight lanes, address of data) of what changes them."""

    def make(typingctx: Any, lanes: Any, data: Any) -> tuple[Any, _Codegen]:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = builder.inttoptr(arguments[0], _LANES.as_pointer())
            found = change(builder, builder.load(place, align=8), arguments[1])
            builder.store(found, place, align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return intrinsic(make)


def _take_block(builder: Any, lanes: Any, data: Any) -> Any:
    for stripe in range(_STRIPES):
        lanes = _stripe(builder, lanes, _load(builder, data, stripe * _STRIPE_NBYTES), _secret_at(8 * stripe))
    mixed = builder.xor(lanes, builder.lshr(lanes, _vector([47] * 8)))
    return builder.mul(builder.xor(mixed, _secret_at(_SCRAMBLE_AT)), _vector([_P32[0]] * 8))


def _take_last(builder: Any, lanes: Any, data: Any) -> Any:
    return _stripe(builder, lanes, _load(builder, data, 0), _secret_at(_LAST_AT))


_block, _last = _on_lanes(_take_block), _on_lanes(_take_last)


@intrinsic
def _one_stripe(typingctx: Any, lanes: Any, data: Any, secret: Any) -> tuple[Any, _Codegen]:
    """As a block's, with the secret at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], _LANES.as_pointer())
        found = _stripe(
            builder, builder.load(place, align=8), _load(builder, arguments[1], 0), _load(builder, arguments[2], 0)
        )
        builder.store(found, place, align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


_SECRETS = np.stack([np.frombuffer(_SECRET[8 * stripe : 8 * stripe + 64], np.uint64) for stripe in range(_STRIPES)])


@inner
def _folded(a, b):
    """The halves of a product of 128 bits, one xor the other."""
    low_a, high_a, low_b, high_b = a & _LOW, a >> _SHIFT, b & _LOW, b >> _SHIFT
    low, high = low_a * low_b, high_a * high_b
    left, right = high_a * low_b, low_a * high_b
    crossed = (low >> _SHIFT) + (left & _LOW) + right
    return ((crossed << _SHIFT) | (low & _LOW)) ^ (high + (left >> _SHIFT) + (crossed >> _SHIFT))


@inner
def xxh3_64(address, nbytes):
    """The checksum, as uint64, of at least `SHORTEST_NBYTES` bytes."""
    at = stack_words(8)
    lanes = carray(int64_pointer(at), (8,)).view(np.uint64)
    for lane in range(8):
        lanes[lane] = _START[lane]
    blocks = (nbytes - 1) // _BLOCK_NBYTES
    for block in range(blocks):
        _block(at, address + block * _BLOCK_NBYTES)
    rest = address + blocks * _BLOCK_NBYTES
    for stripe in range((nbytes - 1 - blocks * _BLOCK_NBYTES) // _STRIPE_NBYTES):
        _one_stripe(at, rest + stripe * _STRIPE_NBYTES, _SECRETS[stripe].ctypes.data)
    _last(at, address + nbytes - _STRIPE_NBYTES)
    found = np.uint64(nbytes) * _LENGTH_PRIME
    for pair in range(4):
        found += _folded(lanes[2 * pair] ^ _MERGE[2 * pair], lanes[2 * pair + 1] ^ _MERGE[2 * pair + 1])
    found ^= found >> np.uint64(37)
    found *= _AVALANCHE_PRIME
    return found ^ (found >> np.uint64(32))


@entry("uint64(int64, int64)")
def checksum(address: int, nbytes: int) -> int:
    """xxh3-64 of the bytes at an address, at least `SHORTEST_NBYTES`."""
    found: int = xxh3_64(address, nbytes)
    return found
