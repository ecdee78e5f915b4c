# mypy: allow-untyped-defs, allow-untyped-calls
"""Functions that Python or a thread calls: what is compiled into them stays their own.

Numba shares inner functions between all that it loads, by their names. A name has a number in it that each process
counts anew, so what two processes compiled and a third loads may have one name for two functions, of which it would
run one in both places.
"""

from __future__ import annotations

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

_Library: Any = JITCodeLibrary
_Compiler: Any = Compiler


class _OutermostLibrary(_Library):  # type: ignore[misc]
    """Code of which only the functions that were lowered for it can be found by name."""

    def __init__(self, codegen, name):
        super().__init__(codegen, name)
        self._own: set[str] = set()

    def add_llvm_module(self, ll_module):
        self._own.update(function.name for function in ll_module.functions if not function.is_declaration)
        super().add_llvm_module(ll_module)

    def _finalize_final_module(self):
        for function in self._final_module.functions:
            if not function.is_declaration and function.name not in self._own:
                function.linkage = "internal"
        super()._finalize_final_module()


class OutermostCompiler(_Compiler):  # type: ignore[misc]
    """Numba's `pipeline_class` for such functions."""

    def compile_extra(self, func):
        """Numba's own, into code as above."""
        self.state.library = _OutermostLibrary(self.state.targetctx.codegen(), func.__qualname__)
        self.state.library.enable_object_caching()
        return super().compile_extra(func)
