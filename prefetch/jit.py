"""How this package's functions are compiled; see `cpu_kernels.compiling`.

They keep the GIL: they take microseconds, and a thread that gives it up waits for whoever takes it.
"""

from __future__ import annotations

from typing import Any

from cpu_kernels.compiling.compiler import KernelCompiler

_compiler = KernelCompiler("prefetch")

# Compiled into whatever calls it.
inner: Any = _compiler.inner()

# Likewise; numbers are never NaN, and minima and sums may be taken in any order, so that vectors take them.
inner_unordered: Any = _compiler.inner(fastmath={"nnan", "nsz", "reassoc"})

entry = _compiler.entry
