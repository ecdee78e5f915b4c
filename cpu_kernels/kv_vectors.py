# mypy: allow-untyped-calls
"""LLVM code that the kernels of KV blocks share: vectors of 8 lanes at addresses."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

PIECE = 8
_I32, _I64 = ir.IntType(32), ir.IntType(64)


def offset_by(builder: Any, address: Any, offset: int) -> Any:
    """An address some bytes further on."""
    return builder.add(address, ir.Constant(_I64, offset)) if offset else address


def load(builder: Any, address: Any, kind: Any) -> Any:
    """What lies at an address, aligned or not."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def splat(kind: Any, value: int | float) -> Any:
    """A vector constant with one value in all lanes."""
    return ir.Constant(kind, [value] * kind.count)


def broadcast(builder: Any, value: Any, lanes: int = PIECE) -> Any:
    """A vector with one value in all lanes."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, splat(ir.VectorType(_I32, lanes), 0))


def pick(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """A vector of some lanes of two, those of the second numbered after the first's."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))
