"""The reference is transformers' own operations, run on real tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.core_model_loading import Concatenate, Interleave, Transpose

from offload.checkpoint.experts import pick_component
from offload.checkpoint.hf_mapping import Operation
from offload.checkpoint.views import Cut, UnequalShapesError, UnknownOperationError, View, apply_operations, cut
from placement.tensors import ComponentSource, TensorSpan

SLOTS = 3


def run(view, stored):
    """The parameter that a view describes, entry by entry."""
    result = torch.empty(view.shape, dtype=torch.int64)
    for position in torch.cartesian_prod(*[torch.arange(n) for n in view.shape]).reshape(-1, len(view.shape)).tolist():
        axes = list(zip(view.axes, position, strict=True))
        slot = {int(axis.slot[n]) for axis, n in axes} - {-1}
        index = [0] * len(axes)
        for axis, n in axes:
            index[axis.stored] = int(axis.index[n])
        result[tuple(position)] = stored[slot.pop()][tuple(index)]
    return result


def reference(operations, stacked):
    tensors = {f"s{n}": [tensor] for n, tensor in enumerate(stacked)}
    patterns = list(tensors)
    for operation in operations:
        arguments = operation.arguments
        if operation.name == "Concatenate":
            made = Concatenate(arguments["dim"])
        elif operation.name == "Interleave":
            made = Interleave(arguments["dim"], inverse=bool(arguments["inverse"]))
        else:
            made = Transpose(arguments["dim0"], arguments["dim1"])
        tensors = made.convert(tensors, source_patterns=patterns, target_patterns=["t"])
        patterns = ["t"]
    (result,) = tensors.values()
    return result[0] if isinstance(result, list) else result


dimensions = st.integers(1, 2)
later = st.one_of(
    st.builds(lambda d, i: Operation("Interleave", {"dim": d, "inverse": i}), dimensions, st.integers(0, 1)),
    st.sampled_from([(1, 2), (2, 1), (-1, -2)]).map(
        lambda dims: Operation("Transpose", {"dim0": dims[0], "dim1": dims[1], "check_dims": 0})
    ),
)
joins = st.sampled_from([1, 2, -1]).map(lambda d: Operation("Concatenate", {"dim": d}))


@settings(deadline=None, max_examples=60)
@given(join=joins, rest=st.lists(later, max_size=3), slots=st.integers(1, SLOTS))
def test_operations_move_entries_as_transformers_does(join, rest, slots):
    experts, rows, columns = 2, 4, 6
    stacked = torch.arange(slots * experts * rows * columns).reshape(slots, experts, rows, columns)
    operations = [join, *rest]
    expected = reference(operations, list(stacked))
    views = [View.of_source(slot, (rows, columns)) for slot in range(slots)]
    view = apply_operations(views, operations, expected.shape[1:])
    for expert in range(experts):
        assert torch.equal(run(view, stacked[:, expert]), expected[expert])


@pytest.mark.parametrize("out_axis", [0, 1])
@pytest.mark.parametrize("picked", [slice(0, 4), slice(4, 8), slice(0, None, 2), slice(1, None, 2), slice(None)])
@pytest.mark.parametrize("flipped", [False, True])
def test_cut_is_what_the_slice_gives(out_axis, picked, flipped):
    stored = torch.arange(64).reshape(8, 8)
    view = View.of_source(0, stored.shape)
    if flipped:
        view = apply_operations([view], [Operation("Transpose", {"dim0": 1, "dim1": 2, "check_dims": 0})], (1, 1))
    found = cut(view, out_axis, picked, [stored.shape])
    span = TensorSpan("file", 0, stored.nbytes, "I64", tuple(stored.shape))
    source = ComponentSource(span, found.axis, found.first, found.step, found.count, found.transposed)
    parameter = stored.T if flipped else stored
    expected = parameter[picked] if out_axis == 0 else parameter[:, picked].T
    assert torch.equal(pick_component(stored, source), expected)


def test_halves_of_an_interleaved_source_are_blocks_after_it():
    view = View.of_source(0, (6, 2))
    view = apply_operations([view], [Operation("Interleave", {"dim": 1, "inverse": 0})], (6, 2))
    assert cut(view, 0, slice(0, 3), [(6, 2)]) == Cut(0, 0, 0, 2, 3, False)
    assert cut(view, 0, slice(3, 6), [(6, 2)]) == Cut(0, 0, 1, 2, 3, False)


def test_transpose_that_checks_leaves_the_expected_shape_alone():
    operation = Operation("Transpose", {"dim0": 1, "dim1": 2, "check_dims": 1})
    assert apply_operations([View.of_source(0, (2, 3))], [operation], (2, 3)).axes[0].stored == 0
    assert apply_operations([View.of_source(0, (3, 2))], [operation], (2, 3)).axes[0].stored == 1


def test_a_single_entry_has_step_one():
    view = View.of_source(0, (2, 3))
    assert cut(view, 0, slice(1, None, 2), [(2, 3)]) == Cut(0, 0, 1, 1, 1, False)


@pytest.mark.parametrize(
    "operation",
    [
        Operation("Chunk", {}),
        Operation("Concatenate", {"dim": 0}),
        Operation("Interleave", {"dim": 0, "inverse": 0}),
        Operation("Interleave", {"dim": 1, "inverse": 0}),
        Operation("Transpose", {"dim0": 0, "dim1": 1, "check_dims": 0}),
    ],
)
def test_what_cannot_be_expressed_is_refused(operation):
    with pytest.raises(UnknownOperationError):
        apply_operations([View.of_source(0, (3, 4))], [operation], (3, 4))


def test_sources_left_apart_are_refused():
    views = [View.of_source(slot, (3, 4)) for slot in range(2)]
    with pytest.raises(UnknownOperationError, match="several"):
        apply_operations(views, [], (3, 4))


def test_sources_that_do_not_join():
    views = [View.of_source(0, (3, 4)), View.of_source(1, (3, 5))]
    with pytest.raises(UnequalShapesError):
        apply_operations(views, [Operation("Concatenate", {"dim": 1})], (6, 4))


def test_component_across_two_sources_or_out_of_order_is_refused():
    views = [View.of_source(slot, (4, 4)) for slot in range(2)]
    joined = apply_operations(views, [Operation("Concatenate", {"dim": 1})], (8, 4))
    with pytest.raises(UnknownOperationError, match="several"):
        cut(joined, 0, slice(2, 6), [(4, 4)] * 2)
    mixed = apply_operations([views[0]], [Operation("Interleave", {"dim": 1, "inverse": 0})], (4, 4))
    with pytest.raises(UnknownOperationError, match="irregular"):
        cut(mixed, 0, slice(None), [(4, 4)])
