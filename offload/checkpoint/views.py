"""Where each row and column of an expert's parameter lies in the stored tensors.

A conversion moves whole rows and columns, never single weights. So one expert's parameter is described by one list
of indices per axis, and a conversion's operations act on these lists as they act on the tensor's axes. What a
component of the bundle needs is read off at the end, whatever the operations were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offload.checkpoint.hf_mapping import Operation

IntArray = npt.NDArray[np.int64]


class UnknownOperationError(Exception):
    """An operation, or a use of one, that does not only move rows and columns."""


class UnequalShapesError(Exception):
    """Sources that are joined do not fit each other."""


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a parameter.

    Attributes:
        stored: the axis of the stored tensor along which it runs.
        slot: int64 [n], which source each entry comes from; -1 where another axis tells.
        index: int64 [n], the entry's index along the stored axis.
    """

    stored: int
    slot: IntArray
    index: IntArray


@dataclass(frozen=True, eq=False)
class View:
    """One expert's share of a parameter: the parameter without its leading axis."""

    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the share."""
        return tuple(len(axis.index) for axis in self.axes)

    @classmethod
    def of_source(cls, slot: int, shape: Sequence[int]) -> View:
        """The share as it is stored in source number `slot`."""
        return cls(
            tuple(
                Axis(number, np.full(size, slot, np.int64), np.arange(size, dtype=np.int64))
                for number, size in enumerate(shape)
            )
        )


@dataclass(frozen=True)
class Cut:
    """A component as entries first, first + step, ... of one axis of one source; see ComponentSource."""

    slot: int
    axis: int
    first: int
    step: int
    count: int
    transposed: bool


def apply_operations(views: Sequence[View], operations: Sequence[Operation], expected: Sequence[int]) -> View:
    """Run a conversion's operations, the merging of a list of experts excepted.

    Args:
        views: the sources, in the conversion's order.
        operations: axis 0 is that of the experts, which no view has.
        expected: shape of one expert's share of the parameter.

    Raises:
        UnknownOperationError: the operations do something else than moving rows and columns.
        UnequalShapesError: sources to be joined differ in another axis.
    """
    current = list(views)
    for operation in operations:
        arguments = operation.arguments
        if operation.name == "Concatenate":
            current = [_concatenate(current, arguments["dim"])]
        elif operation.name == "Interleave":
            current = [_interleave(_single(current), arguments["dim"], bool(arguments["inverse"]))]
        elif operation.name == "Transpose":
            view = _single(current)
            if not (arguments["check_dims"] and view.shape == tuple(expected)):
                current = [_transpose(view, arguments["dim0"], arguments["dim1"])]
        else:
            raise UnknownOperationError(operation.name)
    return _single(current)


def cut(view: View, out_axis: int, picked: slice, stored_shapes: Sequence[Sequence[int]]) -> Cut:
    """Describe the entries `picked` of axis `out_axis` of a view as a cut of one stored tensor.

    Args:
        view: of the whole parameter.
        out_axis: the view's axis of outputs, which becomes the component's rows.
        picked: entries of that axis.
        stored_shapes: shape of one expert's share in each source.

    Raises:
        UnknownOperationError: the component is no regular cut of a single source.
    """
    axes = list(view.axes)
    out = axes[out_axis]
    axes[out_axis] = Axis(out.stored, out.slot[picked], out.index[picked])
    slots = {int(slot) for axis in axes for slot in np.unique(axis.slot)} - {-1}
    if len(slots) != 1:
        raise UnknownOperationError("a component out of several tensors")
    slot = slots.pop()
    ranges = {axis.stored: _progression(axis.index) for axis in axes}
    partial = [n for n, entries in ranges.items() if entries != (0, 1, stored_shapes[slot][n])]
    if len(partial) > 1:
        raise UnknownOperationError("a component cut along two axes")
    axis_number = partial[0] if partial else 0
    transposed = len(axes) == 2 and axes[out_axis].stored == 1
    return Cut(slot, axis_number, *ranges[axis_number], transposed)


def _single(views: list[View]) -> View:
    if len(views) != 1:
        raise UnknownOperationError("several tensors without a Concatenate")
    return views[0]


def _axis_of(view: View, dim: int) -> int:
    """The view's axis for a dimension of the parameter, which has the experts' axis in front."""
    dimensions = len(view.axes) + 1
    dim = dim + dimensions if dim < 0 else dim
    if not 0 < dim < dimensions:
        raise UnknownOperationError(f"an operation along dimension {dim} of {dimensions}")
    return dim - 1


def _concatenate(views: list[View], dim: int) -> View:
    number = _axis_of(views[0], dim)
    for view in views[1:]:
        same_others = len(view.axes) == len(views[0].axes) and all(
            n == number or np.array_equal(axis.index, views[0].axes[n].index) for n, axis in enumerate(view.axes)
        )
        if not same_others or [axis.stored for axis in view.axes] != [axis.stored for axis in views[0].axes]:
            raise UnequalShapesError(f"{[list(view.shape) for view in views]}")
    joined = Axis(
        views[0].axes[number].stored,
        np.concatenate([view.axes[number].slot for view in views]),
        np.concatenate([view.axes[number].index for view in views]),
    )
    others = [Axis(axis.stored, np.full_like(axis.slot, -1), axis.index) for axis in views[0].axes]
    others[number] = joined
    return View(tuple(others))


def _interleave(view: View, dim: int, inverse: bool) -> View:
    number = _axis_of(view, dim)
    axis = view.axes[number]
    if len(axis.index) % 2:
        raise UnknownOperationError(f"Interleave of {len(axis.index)} entries")
    order = np.arange(len(axis.index), dtype=np.int64)
    order = order.reshape((2, -1) if inverse else (-1, 2)).T.reshape(-1)
    axes = list(view.axes)
    axes[number] = Axis(axis.stored, axis.slot[order], axis.index[order])
    return View(tuple(axes))


def _transpose(view: View, dim0: int, dim1: int) -> View:
    first, second = _axis_of(view, dim0), _axis_of(view, dim1)
    axes = list(view.axes)
    axes[first], axes[second] = axes[second], axes[first]
    return View(tuple(axes))


def _progression(index: IntArray) -> tuple[int, int, int]:
    if len(index) == 0:
        raise UnknownOperationError("an empty component")
    steps = np.unique(np.diff(index))
    if len(steps) > 1 or (len(steps) == 1 and steps[0] <= 0):
        raise UnknownOperationError("a component of irregularly spaced rows")
    return int(index[0]), int(steps[0]) if len(steps) else 1, len(index)
