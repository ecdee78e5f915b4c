# mypy: allow-untyped-defs
"""Starting the threads of a pool from compiled code, so that a small kernel costs one call from Python.

A launcher is a compiled function void(int64 state, int64 task, int64 job, int64 chunks): it runs all chunks of a
task on the threads of the pool that `state` describes, and returns when they are done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from cpu_kernels.jit import compiled_function, inner, intrinsic
from cpu_kernels.threads_kernel import call_task

_I64 = ir.IntType(64)
_Codegen = Callable[[Any, Any, Any, Any], Any]


class Launcher(NamedTuple):
    """A pool as compiled code sees it.

    Attributes:
        function: address of its launcher.
        state: address of what the launcher works on; the pool keeps it.
    """

    function: int
    state: int


def launcher_address(function: Any) -> int:
    """Address of a launcher, compiled or from the cache."""
    return compiled_function(function, types.void, *[types.int64] * 4)


@intrinsic
def _call_launcher(typingctx: Any, function: Any, state: Any, task: Any, job: Any, chunks: Any) -> tuple[Any, _Codegen]:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function_type = ir.FunctionType(ir.VoidType(), [_I64] * 4)
        builder.call(builder.inttoptr(arguments[0], function_type.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@inner
def run_inline(task, job, chunks):
    """As `launch`, all of it on the calling thread."""
    for chunk in range(chunks):
        call_task(task, job.ctypes.data, chunk)


@inner
def launch_at(function, state, task, job_address, chunks):
    """As `launch`, for a job that the caller keeps alive."""
    if chunks == 1:
        call_task(task, job_address, 0)
    else:
        _call_launcher(function, state, task, job_address, chunks)


@inner
def launch(function, state, task, job, chunks):
    """Run all chunks of a task: on the calling thread where there is but one, else on the launcher's threads.

    job: int64 array. Numba frees an array after its last use; as an argument it lives until this returns.
    """
    if chunks == 1:
        call_task(task, job.ctypes.data, 0)
    else:
        _call_launcher(function, state, task, job.ctypes.data, chunks)
