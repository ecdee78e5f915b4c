# mypy: allow-untyped-defs, allow-untyped-calls
"""Functions that are only ever called by compiled functions: no code of their own is made of them.

Numba treats every function as one that Python may call: it optimises each together with all that it calls, makes
machine code of it and of two wrappers, and then links the optimised code into its callers, where this begins again.
Here it is typed, lowered and cleaned up by itself (without that, LLVM makes vectors of fewer loops that it is inlined
into), and everything else is done once, for all together, where the outermost is compiled.
"""

from __future__ import annotations

from typing import Any

from numba._dynfunc import make_function
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

_Library: Any = JITCodeLibrary
_Compiler: Any = Compiler


class _InlinedLibrary(_Library):  # type: ignore[misc]
    """Code to be linked into other code."""

    def _optimize_final_module(self):
        pass

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True


class InlinedCompiler(_Compiler):  # type: ignore[misc]
    """Numba's `pipeline_class` for such functions. Called from Python they would crash."""

    def __init__(self, typingctx, targetctx, library, args, return_type, flags, local_types):
        flags = flags.copy()
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        super().__init__(typingctx, targetctx, library, args, return_type, flags, local_types)

    def compile_extra(self, func):
        """Numba's own, with what it leaves out where a function is not compiled."""
        self.state.library = _InlinedLibrary(self.state.targetctx.codegen(), func.__qualname__)
        result = super().compile_extra(func)
        # Callers find it by an object that stands for its machine code.
        entry = make_function(
            result.fndesc.lookup_module(), func.__name__, "", 0, result.environment, (result.library,)
        )
        result.target_context.insert_user_function(entry, result.fndesc, [result.library])
        return result._replace(entry_point=entry)
