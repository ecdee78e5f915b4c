"""Which instructions the kernels use, chosen when a kernel is first compiled.

ISAs are levels in the order of ISAS. A kernel's operation has code for some of them and takes the best that the CPU
has and that is not above the chosen level. `generic` is portable LLVM vector code for every CPU that Numba supports.

    level         dot products of bytes (packed formats)              dot products of bf16
    generic       widened to 32 bits                                  widened to fp32
    neon_dot      SDOT of Armv8.2                                     as generic
    avx2          VPMADDUBSW for 4 bits, VPMADDWD for 8 (exact)       as generic
    avx2_vnni     VPDPBUSD on 256 bits (AVX-VNNI, or AVX-512 VL)      as generic
    avx512_vnni   VPDPBUSD on 512 bits                                as generic
    avx512_bf16   as avx512_vnni                                      VDPBF16PS

From avx512_vnni on kernels of KV blocks have 32 vector registers and, with VBMI, look bytes up in tables.

The environment variable OFFLOAD_CPU_ISA forces a level. What a CPU has is read from Numba's own target, so
that NUMBA_CPU_NAME and NUMBA_CPU_FEATURES, which restrict the compiler, restrict the choice as well.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from typing import Literal, get_args

from numba.core.registry import cpu_target

Isa = Literal["generic", "neon_dot", "avx2", "avx2_vnni", "avx512_vnni", "avx512_bf16"]
ISAS: tuple[Isa, ...] = get_args(Isa)
ISA_VARIABLE = "OFFLOAD_CPU_ISA"

# Any one of the sets will do.
_REQUIRED_FEATURES: dict[Isa, tuple[tuple[str, ...], ...]] = {
    "generic": ((),),
    "neon_dot": (("neon", "dotprod"),),
    "avx2": (("avx2",),),
    "avx2_vnni": (("avx2", "avxvnni"), ("avx2", "avx512vl", "avx512vnni")),
    "avx512_vnni": (("avx512f", "avx512bw", "avx512vnni"),),
    "avx512_bf16": (("avx512f", "avx512bw", "avx512bf16"),),
}

_BF16_DOT: tuple[Isa, ...] = ("generic", "avx512_bf16")
_BYTE_DOT: tuple[Isa, ...] = ("generic", "neon_dot", "avx2", "avx2_vnni", "avx512_vnni")
# Formats that are not named have generic code only.
_ISAS_OF_FORMAT: dict[str, tuple[Isa, ...]] = {
    "bf16": _BF16_DOT,
    "int8": _BYTE_DOT,
    "int4": _BYTE_DOT,
    "mxfp4": _BYTE_DOT,
}


@cache
def cpu_features() -> frozenset[str]:
    """LLVM names of the features that Numba compiles for on this machine."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(feature[1:] for feature in features.split(",") if feature.startswith("+"))


def supports(isa: Isa) -> bool:
    """Whether kernels compiled for `isa` run here."""
    return any(cpu_features().issuperset(required) for required in _REQUIRED_FEATURES[isa])


def choose_isa(forced: str | None = None) -> Isa:
    """The level to compile for: `forced`, else OFFLOAD_CPU_ISA, else the best that this CPU has.

    Raises:
        ValueError: the forced name is not one of ISAS, or this CPU lacks its instructions.
    """
    source = "isa" if forced is not None else ISA_VARIABLE
    name = forced if forced is not None else os.environ.get(ISA_VARIABLE)
    if not name:
        return next(isa for isa in reversed(ISAS) if supports(isa))
    for isa in ISAS:
        if isa == name:
            if not supports(isa):
                missing = ", ".join(sorted(set(_REQUIRED_FEATURES[isa][-1]) - cpu_features()))
                raise ValueError(f"{source}={name}: this CPU, or the features Numba may use, lacks {missing}")
            return isa
    raise ValueError(f"{source}={name!r} is unknown; choose one of {', '.join(ISAS)}")


def isa_of_format(format: str) -> Isa:
    """The ISA that kernels of an element or packed format are compiled for.

    Raises:
        ValueError: the environment forces an ISA that is not there, or this CPU cannot convert the format.
    """
    level = ISAS.index(choose_isa())
    if format == "fp16" and not converts_fp16():
        raise ValueError("format fp16: this CPU, or the features Numba may use, lacks f16c; convert to bf16 or fp32")
    known = _ISAS_OF_FORMAT.get(format, ("generic",))
    return next(isa for isa in reversed(known) if ISAS.index(isa) <= level and supports(isa))


def converts_fp16() -> bool:
    """Whether kernels may convert fp16.

    Without the instruction LLVM calls a function of a compiler's run-time library and, lacking it, ends the process.
    """
    return platform.machine() not in ("x86_64", "AMD64") or "f16c" in cpu_features()


def vector_registers() -> int:
    """How many registers of 8 fp32 lanes kernels of KV blocks may fill: 32 from avx512_vnni on, else 16."""
    return 32 if _has_wide_level() and "avx512vl" in cpu_features() else 16


def looks_up_bytes() -> bool:
    """Whether an instruction looks 64 bytes up in a table of 128 (VPERMI2B), from avx512_vnni on."""
    return _has_wide_level() and "avx512vbmi" in cpu_features()


def _has_wide_level() -> bool:
    return ISAS.index(choose_isa()) >= ISAS.index("avx512_vnni") and supports("avx512_vnni")
