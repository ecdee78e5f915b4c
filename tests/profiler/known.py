"""A machine whose every time is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from placement.curves import TokenCurve
from placement.disk import Overlap
from placement.hardware_profile import SMALL_PROMPT_TOKENS, HardwareProfile, Overheads
from profiler.effort import FULL
from profiler.machine import Machine
from profiler.subjects import Attention, Product, WholePasses

MACHINE = Machine("made up", 4, 1 << 34, (), ("torch 1",), 7)
TOKENS = FULL.tokens
EXPERTS = {
    "bf16": TokenCurve(2e-5, TOKENS, tuple(1e-10 * t for t in TOKENS)),
    "int4": TokenCurve(3e-5, (1,), (2e-11,), 4e-10, 2e-6),
}
LINEARS = {"bf16": TokenCurve(1e-5, (1,), (9e-11,), 2e-9), "int4": TokenCurve(4e-6, (1,), (3e-11,))}
BLOCKS = {
    "bf16": (2e-5, 8e10),
    "fp32": (3e-5, 9e10),
    "fp8_e4m3": (4e-5, 6e10),
    "int8": (1e-5, 2e11),
    "int4": (2e-5, 1e11),
}
"""(seconds of a call, flops per second) of attention to blocks."""
BLOCK_SCORE_S, FEW_SCORE_S, SCORE_S = 1e-10, 4e-10, 2e-9
"""Seconds of a score beside its products: to blocks, of one new token, of many."""

SMALL_PASS_S = {1: 3e-4, SMALL_PROMPT_TOKENS: 5e-3}


class Known:
    """A runtime that takes the seconds that it is told."""

    formats = ("bf16", "int4")

    def __init__(self) -> None:
        self.profile: HardwareProfile | None = None

    def experts(self, format: str, count: int, tokens: int, *, narrow: bool = False) -> Product:
        weights = count * (10**5 if narrow else 10**6)
        entries = 0 if format == "bf16" else count * (1000 if narrow else 3000)
        return Product(
            weights, partial(EXPERTS[format].seconds, weights, tokens, 1, entries, count), entries, items=count
        )

    def linear(self, format: str, rows: int, tokens: int) -> Product:
        entries = rows + 1000
        return Product(rows * 1000, partial(LINEARS[format].seconds, rows * 1000, tokens, 1, entries), entries)

    def attention(self, new_tokens: int, cached_tokens: int, *, narrow: bool = False) -> Attention:
        scores = 20.0 * new_tokens * (cached_tokens + new_tokens)
        flops = (250 if narrow else 500) * scores
        call_s, speed, score_s = (5e-5, 1e9, FEW_SCORE_S) if new_tokens == 1 else (9e-4, 1e11, SCORE_S)
        seconds = call_s + flops / speed + score_s * scores
        return Attention(1000 * (cached_tokens + new_tokens), flops, lambda: seconds, scores=scores)

    def block_attention(self, format: str, cached_tokens: int, *, narrow: bool = False) -> Attention:
        call_s, speed = BLOCKS[format]
        scores = 40.0 * cached_tokens
        flops = (250 if narrow else 500) * scores
        seconds = call_s + flops / speed + BLOCK_SCORE_S * scores
        return Attention(cached_tokens, flops, lambda: 4 * seconds, 4, scores)

    def stream(self) -> float:
        return 2e10

    def read(self, block_nbytes: int, in_flight: int, blocks: int) -> float:
        return 1e-4 + blocks * block_nbytes / (in_flight * 5e8)

    def read_first(self, nbytes: int) -> float:
        assert self.profile is None
        return 3e8

    def beside_kernels(self, call: Callable[[], float], format: str, count: int, tokens: int) -> tuple[float, float]:
        return (2.0 * call(), 0.4) if (count, tokens) == (1, 1) else (1.25 * call(), 0.7)

    def between_reads(self, read: Callable[[], float], format: str) -> float:
        return 0.7 if read() > 0 else 0.0

    def small_pass(self, tokens: int) -> Callable[[], object]:
        return lambda: SMALL_PASS_S[tokens]

    def passes(self, profile: HardwareProfile, quant: str | None) -> WholePasses:
        self.profile = profile
        overheads = Overheads(1e-3, 2e-4 if quant is None else 5e-4, 3e-9)
        return WholePasses(overheads, Overlap(16, 0.8, 0.6))


class KnownAccelerator:
    """Likewise an accelerator; a hundred times as fast."""

    formats = ("bf16", "int4")
    name = "a card"
    memory_nbytes = 8 << 30
    LINKS = {  # noqa: RUF012 - a table
        (True, True): (2e-5, 2.5e10),
        (True, False): (3e-5, 8e9),
        (False, True): (1e-5, 2.2e10),
        (False, False): (4e-5, 6e9),
    }
    """(latency_s, bytes_per_s) by (up, pinned)."""

    def __init__(self, lockable_nbytes: int = 1 << 40) -> None:
        self.lockable_nbytes = lockable_nbytes
        self.profiles: dict[str | None, HardwareProfile] = {}
        self.measured: set[str] = set()

    def experts(self, format: str, count: int, tokens: int, *, narrow: bool = False) -> Product:
        self.measured.add(format)
        weights = count * (10**5 if narrow else 10**6)
        entries = count * (1000 if narrow else 3000)
        seconds = 0.01 * EXPERTS["int4"].seconds(weights, tokens, 1, entries, count)
        return Product(weights, lambda: seconds, entries, items=count)

    def linear(self, format: str, rows: int, tokens: int) -> Product:
        entries = rows + 1000
        seconds = 0.01 * LINEARS[format].seconds(rows * 1000, tokens, 1, entries)
        return Product(rows * 1000, lambda: 4 * seconds, entries, 4)

    def attention(self, new_tokens: int, cached_tokens: int, *, narrow: bool = False) -> Attention:
        assert not narrow, "on accelerators scores are not told apart"
        flops = 1e4 * new_tokens * (cached_tokens + new_tokens)
        call_s, speed = (5e-6, 1e12) if new_tokens == 1 else (9e-6, 1e13)
        return Attention(1000 * (cached_tokens + new_tokens), flops, lambda: 8 * (call_s + flops / speed), 8)

    def stream(self) -> float:
        return 2e12

    def copy(self, nbytes: int, count: int, *, up: bool, pinned: bool) -> float:
        latency_s, bytes_per_s = self.LINKS[up, pinned]
        return count * (latency_s + nbytes / bytes_per_s)

    def lock_memory(self, nbytes: int) -> int:
        return min(nbytes, self.lockable_nbytes)

    def passes(self, profile: HardwareProfile, quant: str | None) -> Overheads:
        self.profiles[quant] = profile
        return Overheads(2e-4, 3e-5 if quant is None else 4e-5, 1e-10)
