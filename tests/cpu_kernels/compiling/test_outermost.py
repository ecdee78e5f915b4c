"""Functions that two processes compiled do not take each other's parts where a third loads both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# An inner function that is too long for LLVM to inline, in two variants of one name, in tasks of one name.
_MODULE = """
import ctypes
import sys

from numba import types

from cpu_kernels.compiling.compiler import KernelCompiler
from cpu_kernels.compiling.kept import KeptFunctions
from cpu_kernels.jit import carray
from cpu_kernels.simd import int64_pointer

compiler = KernelCompiler("cpu_kernels.compiling")


def inner_of(factor):
    @compiler.inner()
    def work(x):
        total = x
        STEPS
        return total

    return work


def address_of(factor):
    work = inner_of(factor)

    def task(address):
        numbers = carray(int64_pointer(address), (2,))
        numbers[1] = work(numbers[0]) + work(numbers[0] + 1)

    return compiler.address(task, types.void, types.int64)


def result(factor):
    numbers = (ctypes.c_int64 * 2)(5, 0)
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(address_of(factor))(ctypes.addressof(numbers))
    return numbers[1]


def expected(factor):
    def work(x):
        total = x
        STEPS
        return total

    return work(5) + work(6)


factors = [int(word) for word in sys.argv[1:]]
assert [result(factor) for factor in factors] == [expected(factor) for factor in factors]
print(KeptFunctions.compiled)
"""
_STEP = "total = (total * 31 + factor * {}) % 1000003 if total % {} else total // 3 + {}\n        "


def _compiled(script: Path, *factors: int) -> int:
    """How many functions a process compiled that ran the variants of some factors; it checks what they return."""
    paths = os.pathsep.join(path for path in sys.path if path)
    ran = subprocess.run(
        [sys.executable, script, *map(str, factors)],
        env={**os.environ, "PYTHONPATH": paths, "NUMBA_CACHE_DIR": str(script.parent / "kept")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


def test_variants_that_two_processes_compiled_stay_apart_in_a_third(tmp_path: Path) -> None:
    script = tmp_path / "variants.py"
    steps = "".join(_STEP.format(number, number + 2, number) for number in range(40))
    script.write_text(_MODULE.replace("STEPS", steps))
    assert _compiled(script, 3) == 1
    assert _compiled(script, 7) == 1
    assert _compiled(script, 3, 7) == 0
    assert _compiled(script, 7, 3) == 0
