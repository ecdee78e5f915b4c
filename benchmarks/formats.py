"""What packing loses and how fast it is, beside the quantiser of the gguf package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from benchmarks.harness import Report, Spread, say
from cpu_kernels.packing import pack_into
from formats.pack import pack_matrix, round_to_bf16, unpack_matrix
from formats.packed import PACKED_FORMATS, MatrixLayout

TRAINED_MODEL = Path(__file__).resolve().parents[1] / "examples" / "tiny_moe" / "model" / "model.safetensors"

PACKING_TARGET_MB_PER_S = 500.0

_GGUF_BITS = {"q4_0": 4.5, "q8_0": 8.5}
_OURS_BESIDE = {"int4": "q4_0", "int8": "q8_0"}

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class FormatsScale:
    """How much is measured: rows and columns of the random matrix, repeats of packing it."""

    rows: int
    columns: int
    rounds: int


FULL = FormatsScale(rows=8192, columns=2048, rounds=9)
QUICK = FormatsScale(rows=1024, columns=2048, rounds=3)


def run(scale: FormatsScale) -> Report:
    """Gate the compiled packer on the reference, then compare errors and time it on one core."""
    report = Report("formats")
    generator = np.random.default_rng(0)
    gaussian = generator.standard_normal((scale.rows, scale.columns)).astype(np.float32)
    say("packing errors")
    matrices = {
        "gaussian": [gaussian],
        "trained experts": _trained(".experts."),
        "trained attention": _trained("attn."),
    }
    for format in PACKED_FORMATS:
        for name, weights in matrices.items():
            expected = pack_matrix(weights[0], format)
            found = _pack(weights[0], format)
            same = all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
            report.gate(f"{format}, {name}: compiled = reference", same, "equal" if same else "differ")
    errors = {
        format: {name: _error(weights, _packed_round_trip(format)) for name, weights in matrices.items()}
        for format in PACKED_FORMATS
    }
    errors |= {
        f"gguf {format}": {name: _error(weights, _gguf_round_trip(format)) for name, weights in matrices.items()}
        for format in _GGUF_BITS
    }
    for format, by_name in errors.items():
        bits = _GGUF_BITS.get(format.removeprefix("gguf ")) or _bits(format)
        row: dict[str, Any] = {"format": format, "bits a weight": bits}
        row |= {f"{name} %": 100 * error for name, error in by_name.items()}
        report.tables.setdefault("RMS error over RMS of the weights", []).append(row)
    for name in matrices:
        for ours, theirs in _OURS_BESIDE.items():
            ratio = errors[ours][name] / errors[f"gguf {theirs}"][name]
            if ours == "int4":
                report.target(f"{ours} error over {theirs}'s, {name}", ratio, "at most", 1.0)
            else:
                report.notes.append(f"{ours} error over {theirs}'s, {name}: {ratio:.3f}, with a quarter of a bit less")
    say("packing speed")
    bf16 = (round_to_bf16(gaussian).view(np.uint32) >> 16).astype(np.uint16)
    for format in PACKED_FORMATS:
        seconds = _pack_seconds(bf16, format, scale.rounds)
        rate = Spread.of([bf16.nbytes / 1e6 / second for second in seconds])
        report.tables.setdefault("Packing on one core", []).append({"format": format, "MB/s of bf16": rate})
        report.target(f"packing {format}, MB/s of bf16 on one core", rate.median, "at least", PACKING_TARGET_MB_PER_S)
    return report


def _trained(part: str) -> list[Floats]:
    with safe_open(TRAINED_MODEL, framework="pt") as file:
        names = [name for name in file.keys() if part in name and name.endswith("proj.weight")]  # noqa: SIM118
        return [file.get_tensor(name).float().numpy() for name in names]


def _bits(format: str) -> float:
    layout = MatrixLayout(128, 128, format)
    return layout.nbytes * 8 / (128 * 128)


def _error(matrices: list[Floats], round_trip: Callable[[Floats], Floats]) -> float:
    lost = sum(float(np.square(round_trip(weights) - weights, dtype=np.float64).sum()) for weights in matrices)
    return float(np.sqrt(lost / sum(float(np.square(weights, dtype=np.float64).sum()) for weights in matrices)))


def _packed_round_trip(format: str) -> Callable[[Floats], Floats]:
    def round_trip(weights: Floats) -> Floats:
        return unpack_matrix(*_pack(weights, format), MatrixLayout(*weights.shape, format))  # type: ignore[call-arg]

    return round_trip


def _gguf_round_trip(format: str) -> Callable[[Floats], Floats]:
    kind = gguf.GGMLQuantizationType[format.upper()]

    def round_trip(weights: Floats) -> Floats:
        dequantised: Floats = gguf.dequantize(gguf.quantize(weights, kind), kind)
        return dequantised

    return round_trip


def _pack(weights: npt.NDArray[Any], format: str) -> tuple[Bytes, Bytes]:
    layout = MatrixLayout(weights.shape[0], weights.shape[1], format)
    codes, scales = np.empty(layout.codes_nbytes, np.uint8), np.empty(layout.scales_nbytes, np.uint8)
    pack_into(weights, layout, codes, scales)
    return codes, scales


def _pack_seconds(weights: npt.NDArray[Any], format: str, rounds: int) -> list[float]:
    layout = MatrixLayout(weights.shape[0], weights.shape[1], format)
    codes, scales = np.zeros(layout.codes_nbytes, np.uint8), np.zeros(layout.scales_nbytes, np.uint8)
    seconds = []
    for _ in range(rounds + 1):
        before = perf_counter()
        pack_into(weights, layout, codes, scales)
        seconds.append(perf_counter() - before)
    return seconds[1:]
