"""Records come back from JSON as they were, and nothing else is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from placement.records import from_data, from_json, to_json


@dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Outer:
    kind: Literal["a", "b"]
    share: float
    count: int
    flag: bool
    inner: Inner
    maybe: Inner | None
    many: tuple[Inner, ...]

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count below zero")


RECORD = Outer("a", 0.5, 3, True, Inner("x", (1, 2)), None, (Inner("y", ()), Inner("z", (3,))))


def test_a_record_comes_back() -> None:
    assert from_json(Outer, to_json(RECORD, 7), 7, "thing") == RECORD


def test_a_whole_number_is_a_float_too() -> None:
    data = json.loads(to_json(RECORD, 7)) | {"share": 1}
    found = from_json(Outer, json.dumps(data), 7, "thing")
    assert found.share == 1.0
    assert type(found.share) is float


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "c"),
        ("kind", None),
        ("share", "0.5"),
        ("share", True),
        ("share", float("nan")),
        ("share", float("inf")),
        ("count", 1.0),
        ("count", True),
        ("count", -1),
        ("flag", 1),
        ("inner", None),
        ("inner", {"name": "x"}),
        ("inner", {"name": "x", "sizes": [1], "extra": 1}),
        ("inner", {"name": "x", "sizes": 1}),
        ("inner", {"name": "x", "sizes": [1.5]}),
        ("maybe", 1),
        ("many", {}),
        ("many", [None]),
    ],
    ids=str,
)
def test_other_values_are_refused(field: str, value: Any) -> None:
    data = json.loads(to_json(RECORD, 7)) | {field: value}
    with pytest.raises(ValueError):
        from_json(Outer, json.dumps(data), 7, "thing")


def test_missing_and_unknown_fields_are_named() -> None:
    data = json.loads(to_json(RECORD, 7))
    del data["version"], data["share"]
    with pytest.raises(ValueError, match=r"Outer of a thing needs exactly the fields.*'share'"):
        from_data(Outer, data, "thing")


@pytest.mark.parametrize("text", ["", "[]", "1", "[" * 100_000, '{"version": 8}', '{"version": true}'])
def test_other_versions_and_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        from_json(Outer, text, 7, "thing")
