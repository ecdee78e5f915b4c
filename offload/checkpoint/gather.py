"""The stored tensors of one experts parameter, sorted by source and expert, and checked against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offload.checkpoint.dtypes import WEIGHT_DTYPES
from offload.checkpoint.hf_mapping import Conversion, MappedKey, Operation
from offload.checkpoint.mismatch import DOWNLOAD_AGAIN, mismatch
from offload.errors import CheckpointError, UnsupportedModelError
from placement.tensors import TensorSpan


@dataclass(frozen=True)
class StoredShare:
    """One expert's share of one source.

    Attributes:
        key: of the stored tensor, which may hold other experts as well.
        span: the share's own bytes.
    """

    key: str
    span: TensorSpan


@dataclass(frozen=True)
class StoredParameter:
    """Everything that a parameter is made of.

    Attributes:
        slots: per source of the conversion, the share of each expert; shares of a slot have one shape and dtype.
        operations: what is left to do with the shares.
        pattern: how messages name the conversion.
    """

    slots: tuple[tuple[StoredShare, ...], ...]
    operations: tuple[Operation, ...]
    pattern: str


def gather(target: str, keys: Sequence[MappedKey], tensors: Mapping[str, TensorSpan], count: int) -> StoredParameter:
    """Collect the shares of one experts parameter.

    Args:
        target: the parameter's name in the model.
        keys: all checkpoint keys that end in it; not empty.
        tensors: the checkpoint.
        count: experts.

    Raises:
        CheckpointError: a share is missing, there twice, or differs in shape or dtype from its siblings.
        UnsupportedModelError: the conversion makes several parameters.
    """
    conversion = keys[0].conversion
    other = next((key for key in keys if key.conversion != conversion), None)
    if other is not None:
        raise _duplicate(target, keys[0], other, tensors)
    if conversion is None:
        slots: tuple[tuple[StoredShare, ...], ...] = (_shares_of_one(target, keys, tensors, count),)
        return _checked(StoredParameter(slots, (), keys[0].key))
    pattern = ", ".join(conversion.sources)
    if conversion.targets != 1:
        raise UnsupportedModelError(
            f"{target}: expected a conversion that makes one parameter, found {pattern} making {conversion.targets}. "
            "Fix: load this model with transformers."
        )
    merges = conversion.operations[0].name == "MergeModulelist"
    slots = tuple(_slot(target, source, merges, keys, tensors, count) for source in conversion.sources)
    operations = conversion.operations[1:] if merges else conversion.operations
    return _checked(StoredParameter(slots, operations, pattern))


def missing_component(target: str, tensors: Mapping[str, TensorSpan]) -> CheckpointError:
    """The error for a parameter that no key of the checkpoint ends in."""
    return CheckpointError(
        f"{_any_file(tensors)}: expected weights for {target!r}, found none among {len(tensors)} tensors. Fix: "
        f"{DOWNLOAD_AGAIN}."
    )


def _slot(
    target: str,
    source: str,
    merges: bool,
    keys: Sequence[MappedKey],
    tensors: Mapping[str, TensorSpan],
    count: int,
) -> tuple[StoredShare, ...]:
    own = [key for key in keys if key.source == source]
    if not own:
        raise CheckpointError(
            f"{tensors[keys[0].key].file}: expected tensors matching {source!r} for {target!r}, found none. Fix: "
            f"{DOWNLOAD_AGAIN}."
        )
    conversion = own[0].conversion
    if merges and "*" in source:
        _check_merge_dimension(target, conversion)
        return _shares_by_expert(target, own, tensors, count)
    if merges or "*" in source:
        raise UnsupportedModelError(
            f"{target}: expected one tensor per expert or one for all, found {source!r} with "
            f"{[operation.name for operation in conversion.operations] if conversion else []}. Fix: load this model "
            "with transformers."
        )
    return _shares_of_one(target, own, tensors, count)


def _check_merge_dimension(target: str, conversion: Conversion | None) -> None:
    if conversion is not None and conversion.operations[0].arguments["dim"] != 0:
        raise UnsupportedModelError(
            f"{target}: expected experts stacked along dimension 0, found MergeModulelist(dim="
            f"{conversion.operations[0].arguments['dim']}). Fix: load this model with transformers."
        )


def _shares_by_expert(
    target: str, keys: Sequence[MappedKey], tensors: Mapping[str, TensorSpan], count: int
) -> tuple[StoredShare, ...]:
    by_expert: dict[int, MappedKey] = {}
    for key in keys:
        if key.expert is None or key.expert >= count:
            raise mismatch(
                tensors[key.key].file, tensor=key.key, expected=f"an expert below {count}", found=f"{key.expert}"
            )
        if key.expert in by_expert:
            raise _duplicate(target, by_expert[key.expert], key, tensors)
        by_expert[key.expert] = key
    for expert in range(count):
        if expert not in by_expert:
            sibling = keys[0]
            before, _, after = sibling.key.rpartition(f".{sibling.expert}.")
            raise mismatch(
                tensors[sibling.key].file,
                tensor=f"{before}.{expert}.{after}",
                expected=f"one tensor for each of {count} experts",
                found="none for this one",
            )
    return tuple(StoredShare(by_expert[e].key, tensors[by_expert[e].key]) for e in range(count))


def _shares_of_one(
    target: str, keys: Sequence[MappedKey], tensors: Mapping[str, TensorSpan], count: int
) -> tuple[StoredShare, ...]:
    if len(keys) > 1:
        raise _duplicate(target, keys[0], keys[1], tensors)
    key = keys[0].key
    span = tensors[key]
    if len(span.shape) < 2 or span.shape[0] != count:
        raise mismatch(
            span.file, tensor=key, expected=f"a tensor of {count} experts for {target!r}", found=f"{list(span.shape)}"
        )
    return tuple(StoredShare(key, span.entry(e)) for e in range(count))


def _checked(parameter: StoredParameter) -> StoredParameter:
    first = parameter.slots[0][0].span
    for slot in parameter.slots:
        shape = slot[0].span.shape
        for share in slot:
            span = share.span
            if span.dtype not in WEIGHT_DTYPES:
                allowed = f"a dtype out of {', '.join(sorted(WEIGHT_DTYPES))}"
                raise mismatch(span.file, tensor=share.key, expected=allowed, found=span.dtype)
            if span.dtype != first.dtype:
                expected = f"dtype {first.dtype}, as in {parameter.slots[0][0].key!r}"
                raise mismatch(span.file, tensor=share.key, expected=expected, found=span.dtype)
            if span.shape != shape:
                expected = f"shape {list(shape)}, as in {slot[0].key!r}"
                raise mismatch(span.file, tensor=share.key, expected=expected, found=f"{list(span.shape)}")
    return parameter


def _duplicate(target: str, one: MappedKey, other: MappedKey, tensors: Mapping[str, TensorSpan]) -> CheckpointError:
    return mismatch(
        tensors[other.key].file,
        tensor=other.key,
        expected=f"every part of {target!r} once",
        found=f"it here and in {one.key!r}",
    )


def _any_file(tensors: Mapping[str, TensorSpan]) -> str:
    return next((span.file for span in tensors.values()), "an empty checkpoint")
