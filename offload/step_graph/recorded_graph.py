"""A step graph that host memory plays: torch's operations are recorded one by one, and replayed into the same memory.

As with a CUDA graph, a replay runs no line of the model's Python: numbers are those of the capture, tensors are those
of the capture, and every result goes where it went. So what would go wrong in a capture (a position that is a Python
number, a branch on a tensor's value, a buffer that is made anew) goes wrong here in the same way, and what is right
here is so for the same reason.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from offload.errors import CaptureError
from offload.step_graph.graph import StepGraph

_aten = torch.ops.aten

_FORBIDDEN = {
    _aten._local_scalar_dense: "reads a value of a tensor",
    _aten.item: "reads a value of a tensor",
    _aten.equal: "compares values of tensors",
    _aten.is_nonzero: "reads a value of a tensor",
    _aten.nonzero: "makes a tensor whose size depends on values",
    _aten.masked_select: "makes a tensor whose size depends on values",
    _aten.lift_fresh: "makes a tensor from numbers of Python, which a GPU would have to wait for",
}
"""Operations that have to wait for a device, which a capture forbids."""

_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}

_EMPTY = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
"""What these give is filled by others. Where those are no operations of torch's, a replay must not look right."""

_NAP_S = 20e-6


class RecordedGraph(StepGraph):
    """The graph of a device that computes in host memory."""

    def __init__(self) -> None:
        self._operations: list[Callable[[], object]] = []
        self._recorder: _Recorder | None = None

    # --- the stream's side: done at once, and kept while recording ------------------------------------------

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """At once."""
        self._do(lambda: target.copy_(source))

    def write_value(self, address: int, value: int) -> None:
        """At once. x86-64 does not reorder stores."""
        word = ctypes.c_uint32.from_address(address)

        def write() -> None:
            word.value = value

        self._do(write)

    def wait_value(self, address: int, value: int) -> None:
        """Look until it is there; other threads run meanwhile."""
        word = ctypes.c_uint32.from_address(address)

        def wait() -> None:
            while word.value != value:
                time.sleep(_NAP_S)

        self._do(wait)

    def call(self, kernels: Callable[[], None]) -> None:
        """At once."""
        self._do(kernels)

    def _do(self, operation: Callable[[], object]) -> None:
        recorder = self._recorder
        if recorder is None:
            operation()
            return
        with recorder.paused():
            operation()
        self._operations.append(operation)

    # --- the graph's ----------------------------------------------------------------------------------------

    def run(self, step: Callable[[], None]) -> None:
        """Do it."""
        step()

    def capture(self, step: Callable[[], None]) -> None:
        """Do it, and keep every operation.

        Raises:
            CaptureError: the step reads values of tensors.
        """
        self._operations.clear()
        self._recorder = _Recorder(self._operations)
        try:
            with self._recorder:
                step()
        except BaseException:
            self._operations.clear()
            raise
        finally:
            self._recorder = None

    def replay(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Do all operations again, into the memory that they had."""
        meanwhile()
        for operation in self._operations:
            operation()


class _Recorder(TorchDispatchMode):
    """Keeps what torch's dispatcher is asked to do."""

    def __init__(self, operations: list[Callable[[], object]]) -> None:
        super().__init__()
        self._operations = operations
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block nothing is kept."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        why = _FORBIDDEN.get(func.overloadpacket) or _why_not_indexed(func, args)
        if why:
            raise CaptureError(f"{func} {why}")
        result = func(*args, **kwargs)
        operation = _again(func, args, kwargs, result)
        if operation is not None:
            self._operations.append(operation)
        return result


def _why_not_indexed(func: Any, args: Any) -> str:
    """Of an index that is a mask: why a capture forbids it."""
    if func.overloadpacket not in _INDEXED:
        return ""
    masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return "makes an index whose size depends on values" if masks else ""


def _again(func: Any, args: Any, kwargs: Any, result: Any) -> Callable[[], object] | None:
    """The same operation into the same memory; None for a view, which has nothing to do."""
    if _writes(func):
        return lambda: func(*args, **kwargs)
    aliases = [returned.alias_info for returned in func._schema.returns]
    if aliases and all(alias is not None for alias in aliases):
        return None
    if func.overloadpacket in _EMPTY:
        return lambda: _poison(result)
    kept = [tensor for tensor in tree_flatten(result)[0] if isinstance(tensor, torch.Tensor)]
    given = {
        tensor.untyped_storage().data_ptr()
        for tensor in tree_flatten((args, kwargs))[0]
        if isinstance(tensor, torch.Tensor)
    }
    if kept and all(tensor.untyped_storage().data_ptr() in given for tensor in kept):
        return None

    def compute() -> None:
        made = [tensor for tensor in tree_flatten(func(*args, **kwargs))[0] if isinstance(tensor, torch.Tensor)]
        for old, new in zip(kept, made, strict=True):
            old.copy_(new)

    return compute


def _poison(tensor: torch.Tensor) -> None:
    tensor.fill_(torch.nan if tensor.is_floating_point() else -1 if tensor.dtype.is_signed else 1)


def _writes(func: Any) -> bool:
    """Whether an operation writes to what it is given; what it returns is then that, or nothing."""
    return any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments)
