"""What every benchmark shares: spreads, turns, gates, targets and reports."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal, TypeVar

import click

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Repeats of one figure: the median and how far they lie apart."""

    median: float
    minimum: float
    maximum: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))


Value = str | int | float | bool | Spread | None
Row = dict[str, Value]
"""One line of a table. Units are in the names of the columns."""


class GateError(Exception):
    """Results are not equal; speed is not reported."""


@dataclass(frozen=True)
class Gate:
    """An equality that held."""

    name: str
    detail: str


@dataclass(frozen=True)
class Target:
    """A figure and what it should be.

    Attributes:
        name: what is compared.
        value: as measured.
        bound: what it should reach or stay below.
        sense: "at least" or "at most".
    """

    name: str
    value: float
    bound: float
    sense: Literal["at least", "at most"]

    @property
    def met(self) -> bool:
        """Whether it does."""
        return self.value >= self.bound if self.sense == "at least" else self.value <= self.bound


@dataclass
class Report:
    """What one benchmark found.

    Attributes:
        name: of the benchmark.
        gates: the equalities that held before anything was timed.
        tables: title → rows, all rows of a table with the same columns.
        targets: what was asked of the runtime.
        notes: what a reader must know to read the figures.
    """

    name: str
    gates: list[Gate] = field(default_factory=list)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def gate(self, name: str, passed: bool, detail: str) -> None:
        """Note that an equality held.

        Raises:
            GateError: it did not.
        """
        if not passed:
            raise GateError(f"{self.name}: {name}: {detail}")
        self.gates.append(Gate(name, detail))

    def target(self, name: str, value: float, sense: Literal["at least", "at most"], bound: float) -> None:
        """Note a figure that has a bound."""
        self.targets.append(Target(name, value, bound, sense))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = asdict(self)
        for plain, target in zip(data["targets"], self.targets, strict=True):
            plain["met"] = target.met
        return data


def say(what: str) -> None:
    """Tell on stderr what a long run is at."""
    click.echo(f"{datetime.now():%H:%M:%S} {what}", err=True)


def interleave(turns: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Call each of `turns` once a round, every second round in reverse order; what each returned, by round.

    The machine's speed drifts: results of one round are comparable, and the order favours nobody.
    """
    results: dict[str, list[T]] = {name: [] for name in turns}
    for index in range(rounds):
        names = list(turns)[:: 1 if index % 2 == 0 else -1]
        for name in names:
            results[name].append(turns[name]())
    return results


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of numerator / denominator, round by round."""
    return Spread.of([above / below for above, below in zip(numerators, denominators, strict=True)])
