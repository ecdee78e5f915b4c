"""Records as JSON: frozen dataclasses of plain values, read back strictly."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_Record = TypeVar("_Record")

_SCALARS: dict[type, Callable[[Any], bool]] = {
    int: lambda value: type(value) is int,
    bool: lambda value: type(value) is bool,
    str: lambda value: type(value) is str,
    # JSON has one kind of number; what is no number at all is refused.
    float: lambda value: type(value) in (int, float) and math.isfinite(value),
}


def to_json(record: Any, version: int) -> str:
    """A record as JSON, with its version beside the fields."""
    return json.dumps({"version": version, **asdict(record)}, indent=2)


def from_json(kind: type[_Record], text: str, version: int, what: str) -> _Record:
    """The record that `to_json` wrote.

    Args:
        kind: the dataclass.
        text: JSON.
        version: the only one that is read.
        what: name of the record, for messages.

    Raises:
        ValueError: not JSON, another version, or see `from_data`.
    """
    try:
        data = json.loads(text)
    except RecursionError:
        data = None
    found = data.pop("version", None) if isinstance(data, dict) else None
    if not isinstance(data, dict) or type(found) is not int or found != version:
        raise ValueError(f"not a {what} of version {version}")
    return from_data(kind, data, what)


def from_data(kind: type[_Record], data: Any, what: str) -> _Record:
    """A record from plain data: dicts of exactly the fields, lists for tuples.

    Fields may be int, float, str, bool, Literal, a record, `tuple[one kind, ...]`, or one of these or None.

    Raises:
        ValueError: fields that are missing, unknown or of another type, or that the record itself refuses.
    """
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(data, dict) or set(data) != names:
        found = sorted(map(str, data)) if isinstance(data, dict) else data
        raise ValueError(f"{kind.__name__} of a {what} needs exactly the fields {sorted(names)}, found {found}")
    return kind(**{name: _value(hint, data[name], f"{name} of a {what}") for name, hint in _hints(kind).items()})


def _hints(kind: type[Any]) -> dict[str, Any]:
    own = {field.name for field in fields(kind)}
    return {name: hint for name, hint in get_type_hints(kind).items() if name in own}


def _value(hint: Any, value: Any, what: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (other,) = (argument for argument in arguments if argument is not type(None))
        return _value(other, value, what)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_value(arguments[0], item, what) for item in value)
    if origin is Literal and value in arguments and type(value) is type(arguments[0]):
        return value
    if isinstance(hint, type) and is_dataclass(hint):
        return from_data(hint, value, what)
    fits = _SCALARS.get(hint)
    if fits is None or not fits(value):
        expected = arguments if origin is Literal else getattr(hint, "__name__", str(hint))
        raise ValueError(f"{what}: expected {expected}, found {value!r}")
    return float(value) if hint is float else value
