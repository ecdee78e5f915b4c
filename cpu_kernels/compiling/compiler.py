"""How functions are compiled: with C's arithmetic (a division by zero does not raise), at their first use, and kept."""

from __future__ import annotations

from functools import cache, partial
from types import FunctionType
from typing import Any, NoReturn

from numba import njit, types
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock

from cpu_kernels.compiling.inlined import InlinedCompiler
from cpu_kernels.compiling.kept import KeptFunctions, closure_digest, source_stamp
from cpu_kernels.compiling.outermost import OutermostCompiler

# It takes options of the target that its annotations leave out.
_njit: Any = njit

_DIGITS = 12


class KernelCompiler:
    """Decorators for one package's functions."""

    def __init__(self, *packages: str, **options: Any) -> None:
        """Make decorators.

        Args:
            packages: whose sources the functions are made of; a change in one compiles them anew.
            options: of `numba.njit`.
        """
        self._packages = packages
        self._options = {"error_model": "numpy", **options}

    def inner(self, **options: Any) -> Any:
        """Decorator of a function that is compiled into whatever calls it; options of `numba.njit` are added.

        Python cannot call it, as it has no code of its own: a TypeError says so.
        """

        def decorate(function: Any) -> Any:
            dispatcher: Any = _njit(**self._options, **options, pipeline_class=InlinedCompiler)(function)
            dispatcher.get_call_template = partial(_template_for_any_integer, dispatcher.get_call_template)
            # Numba would list each variant among those that Python may call, and look for one by compiling it.
            dispatcher.add_overload = partial(_add_for_callers, dispatcher)
            dispatcher._compile_for_args = partial(_refuse, function)
            return dispatcher

        return decorate

    def entry(self, signature: str | None = None) -> Any:
        """Decorator of a function that Python calls, compiled or loaded at its first call.

        With a signature arguments are converted to it; without, there is one variant for each combination of types.
        """

        def decorate(function: Any) -> Any:
            dispatcher: Any = _njit(**self._options, no_cfunc_wrapper=True, pipeline_class=OutermostCompiler)(function)
            dispatcher._cache = KeptFunctions(function, source_stamp(*self._packages))
            if signature is not None:
                dispatcher.declared = signature
                dispatcher.get_call_template = partial(_template_as_declared, dispatcher, dispatcher.get_call_template)
                # Numba asks this for what to call where no variant takes the arguments; later calls find one.
                dispatcher._compile_for_args = lambda *arguments, **named: direct(dispatcher)
            return dispatcher

        return decorate

    def address(self, function: Any, result: Any, *arguments: Any) -> int:
        """Address of a C function, compiled or loaded; the caller keeps it per process.

        The constants that the function closes over are part of what it is kept under, and of its name: compiled code
        is found by it, whichever process made it.
        """
        named = FunctionType(function.__code__, function.__globals__, function.__name__, None, function.__closure__)
        named.__qualname__ = f"{function.__qualname__}.{closure_digest(function)[:_DIGITS]}"
        options = {"error_model": "numpy"}
        compiled: Any = CFunc(named, (arguments, result), {}, options, pipeline_class=OutermostCompiler)
        compiled._cache = KeptFunctions(function, source_stamp(*self._packages))
        compiled.compile()
        return int(compiled.address)


def prepare(dispatcher: Any) -> None:
    """Compile an `entry` that has a signature, or load it, unless that was done; any thread may ask."""
    with global_compiler_lock:
        if not dispatcher.overloads:
            dispatcher.compile(dispatcher.declared)
            dispatcher.disable_compile()


@cache
def direct(dispatcher: Any) -> Any:
    """The compiled function behind an `entry`, without the look at all arguments' types that takes part of each call.

    Only for arrays that the caller made: elements of a wrong size or number of dimensions are refused, integers in
    place of floats and gaps between elements are not.
    """
    prepare(dispatcher)
    (compiled,) = dispatcher.overloads.values()
    return compiled.entry_point


# --- what Numba's dispatchers do otherwise ---


def _template_as_declared(dispatcher: Any, template: Any, *kinds: Any) -> Any:
    """For compiled callers: the declared variant, where Numba would make one for the caller's types."""
    prepare(dispatcher)
    return template(*kinds)


def _template_for_any_integer(template: Any, arguments: Any, named: Any) -> Any:
    """For compiled callers: one variant for all integers, where Numba would make one for each literal."""
    return template(tuple(map(_any_integer, arguments)), {name: _any_integer(kind) for name, kind in named.items()})


def _any_integer(kind: Any) -> Any:
    return kind.literal_type if isinstance(kind, types.IntegerLiteral) else kind


def _add_for_callers(dispatcher: Any, variant: Any) -> None:
    dispatcher.overloads[tuple(variant.signature.args)] = variant


def _refuse(function: Any, *arguments: Any, **named: Any) -> NoReturn:
    raise TypeError(
        f"{function.__module__}.{function.__qualname__} is compiled into the functions that call it; Python can call "
        "only those that are an `entry`"
    )
