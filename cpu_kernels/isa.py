"""Which instructions the kernels use, chosen when a kernel is first compiled.

`generic` is portable LLVM vector code and compiles for every CPU that Numba supports. `avx512_bf16` multiplies
bf16 pairs with VDPBF16PS; it concerns the bf16 format alone.

The environment variable OFFLOAD_CPU_ISA forces one of them. What a CPU has is read from Numba's own target, so
that NUMBA_CPU_NAME and NUMBA_CPU_FEATURES, which restrict the compiler, restrict the choice as well.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from typing import Literal, get_args

from numba.core.registry import cpu_target

Isa = Literal["generic", "avx512_bf16"]
ISAS: tuple[Isa, ...] = get_args(Isa)
ISA_VARIABLE = "OFFLOAD_CPU_ISA"

_REQUIRED_FEATURES: dict[Isa, tuple[str, ...]] = {
    "generic": (),
    "avx512_bf16": ("avx512f", "avx512bw", "avx512bf16"),
}


@cache
def cpu_features() -> frozenset[str]:
    """LLVM names of the features that Numba compiles for on this machine."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(feature[1:] for feature in features.split(",") if feature.startswith("+"))


def supports(isa: Isa) -> bool:
    """Whether kernels compiled for `isa` run here."""
    return cpu_features().issuperset(_REQUIRED_FEATURES[isa])


def choose_isa(forced: str | None = None) -> Isa:
    """The ISA to compile for: `forced`, else OFFLOAD_CPU_ISA, else the best that this CPU has.

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
                missing = ", ".join(sorted(set(_REQUIRED_FEATURES[isa]) - cpu_features()))
                raise ValueError(f"{source}={name}: this CPU, or the features Numba may use, lacks {missing}")
            return isa
    raise ValueError(f"{source}={name!r} is unknown; choose one of {', '.join(ISAS)}")


def isa_of_format(format: str) -> Isa:
    """The ISA that kernels of an element format are compiled for.

    Raises:
        ValueError: the environment forces an ISA that is not there, or this CPU cannot convert the format.
    """
    chosen = choose_isa()
    # Without the instruction LLVM calls a function of a compiler's run-time library and, lacking it, ends the process.
    if format == "fp16" and platform.machine() in ("x86_64", "AMD64") and "f16c" not in cpu_features():
        raise ValueError("format fp16: this CPU, or the features Numba may use, lacks f16c; convert to bf16 or fp32")
    return chosen if format == "bf16" else "generic"
