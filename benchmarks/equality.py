"""The gates: nothing is timed before results are equal, to rounding where the arithmetic differs, else to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Report
from benchmarks.sessions import Decoded
from offload.store import ExpertStore
from offload.store.source import BundleSource

FP32_TOLERANCE = 1e-5
"""Largest difference of two logits over the largest logit, both computed in fp32 in another order."""

BF16_TOLERANCE = 0.02
"""Root mean square of the logits' differences over that of the logits, both computed in bf16, where no choice of an
expert turns on a rounding."""

BF16_NOISE = 1.5
"""Where choices do turn, transformers' own experts implementations differ by more than BF16_TOLERANCE: ours may differ
from one of them by this many times as much as the two do from each other. What that hides, the comparison in fp32
shows."""

GATED_BUNDLES = 16
"""How many bundles are compared byte by byte; checksums cover the others."""

Floats = npt.NDArray[np.float32]


class Model(Protocol):
    """A session, here or in another process."""

    def logits(self, prompt: list[int], file: str) -> None:
        """See `Session.logits`."""
        ...

    def start(self, prompt: list[int]) -> float:
        """See `Session.start`."""
        ...

    def decode(self, count: int) -> Decoded:
        """See `Session.decode`."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a model gives for a prompt.

    Attributes:
        logits: of each prompt token, fp32 [T, V].
        decoded: the tokens after it; decoded.margins[i] belongs to decoded.tokens[i + 1], which pass i chose.
    """

    logits: Floats
    decoded: Decoded


def outcome(model: Model, prompt: list[int], new_tokens: int, scratch: Path) -> Outcome:
    """The logits of a prompt and the greedy tokens after it, with their margins."""
    file = scratch / "logits.npy"
    model.logits(prompt, str(file))
    logits: Floats = np.load(file)
    model.start(prompt)
    return Outcome(logits, model.decode(new_tokens))


def relative_rms(found: Floats, expected: Floats) -> float:
    """Root mean square of the differences over that of what is expected."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def relative_maximum(found: Floats, expected: Floats) -> float:
    """Largest difference over the largest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def gate_close(
    report: Report,
    name: str,
    found: Floats,
    expected: Floats,
    measure: Callable[[Floats, Floats], float],
    tolerance: float,
) -> None:
    """Gate on `measure(found, expected) <= tolerance`; what is not finite is not equal."""
    same_shape = found.shape == expected.shape
    difference = measure(found, expected) if same_shape else float("inf")
    detail = f"{measure.__name__} {difference:.2e}, tolerance {tolerance:.1e}, {len(found)} tokens"
    report.gate(name, bool(np.isfinite(difference)) and difference <= tolerance, detail)


def gate_same_bits(report: Report, name: str, found: Mapping[str, Any]) -> None:
    """Gate on all values being equal, arrays to the bit."""
    (first, expected), *others = found.items()
    for other, value in others:
        same = bool(np.array_equal(value, expected)) if isinstance(value, np.ndarray) else value == expected
        report.gate(f"{name}: {other} = {first}", same, "equal" if same else "differ")


def stored_and_converted(
    store: ExpertStore, source: BundleSource, bundles: Sequence[tuple[int, int]]
) -> dict[str, list[bytes]]:
    """Bundles, given as (group, expert), straight out of the checkpoint and out of the store's files."""
    found: dict[str, list[bytes]] = {"checkpoint": [], "store": []}
    for group, expert in bundles:
        location = store.location(group, expert)
        with open(store.shard_paths[location.shard], "rb") as file:
            file.seek(location.offset)
            found["store"].append(file.read(location.nbytes))
        converted = np.zeros(location.nbytes, dtype=np.uint8)
        source.fill_bundle(group, expert, converted)
        found["checkpoint"].append(converted.tobytes())
    return found


def gate_tokens(report: Report, name: str, found: Outcome, expected: Outcome) -> None:
    """Gate on equal tokens up to the first near-tie: a margin no larger than the logits of the prompt differ anyway."""
    near_tie = float(np.abs(found.logits - expected.logits).max())
    tokens, wanted = found.decoded.tokens, expected.decoded.tokens
    same = 0
    while same < len(tokens) and tokens[same] == wanted[same]:
        same += 1
    detail = f"{same} of {len(tokens)} tokens equal"
    if same == len(tokens) == len(wanted):
        report.gate(name, True, detail)
        return
    second, first = np.partition(expected.logits[-1], -2)[-2:]
    margin = expected.decoded.margins[same - 1] if same else float(first - second)
    report.gate(name, margin <= near_tie, f"{detail}, then a margin of {margin:.3g}; a near-tie is {near_tie:.3g}")
