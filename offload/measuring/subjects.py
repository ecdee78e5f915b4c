"""The subjects that the profiler measures: this runtime's."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Self, TypeVar

import torch

from formats.elements import BF16, FP32
from formats.packed import PACKED_FORMATS
from offload.devices.host_threads import short_waits
from offload.measuring.block_attention import block_attention_calls
from offload.measuring.calibration import DEPTHS, measure_passes
from offload.measuring.kernels import ExpertCalls, LinearCalls, attention_calls
from offload.measuring.reads import BlockReads
from offload.measuring.small_model import SmallModel
from placement.hardware_profile import HardwareProfile, Speeds
from profiler.probe import probe
from profiler.stream import stream_bytes_per_s
from profiler.subjects import Attention, Product, WholePasses
from profiler.timing import repeated

_ALONE_S = 0.05
_BEFORE_PASSES_S = 0.3
_ROWS, _BURSTS = 2048, 7


_Key = TypeVar("_Key", bool, int)
_Calls = TypeVar("_Calls", ExpertCalls, LinearCalls)


class RuntimeSubjects:
    """See `profiler.subjects.Subjects`. A context manager: at its end what it wrote is gone."""

    formats: Sequence[str] = (BF16.name, FP32.name, *PACKED_FORMATS)

    def __init__(self, disk: BlockReads, directory: Path, *, repeats: int, depths: tuple[int, ...] = DEPTHS) -> None:
        """Measure with files that are there.

        Args:
            disk: files to be read.
            directory: of experts for whole passes.
            repeats: of whole passes.
            depths: layers of the models whose passes they are; see `measure_passes`.
        """
        self._disk = disk
        self._directory = directory
        self._repeats = repeats
        self._depths = depths
        self._experts: dict[bool, ExpertCalls] = {}
        self._linears: dict[int, LinearCalls] = {}
        self._small: SmallModel | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._small is not None:
            self._small.close()
            self._small = None

    def experts(self, format: str, count: int, tokens: int, *, narrow: bool = False) -> Product:
        """See `Subjects`."""
        return self._expert_calls(format, narrow=narrow).product(count, tokens)

    def linear(self, format: str, rows: int, tokens: int) -> Product:
        """See `Subjects`."""
        return _of_format(self._linears, format, rows, lambda: LinearCalls(format, rows)).product(tokens)

    def _expert_calls(self, format: str, *, narrow: bool = False) -> ExpertCalls:
        return _of_format(self._experts, format, narrow, lambda: ExpertCalls(format, narrow=narrow))

    def attention(self, new_tokens: int, cached_tokens: int, *, narrow: bool = False) -> Attention:
        """See `Subjects`."""
        return attention_calls(new_tokens, cached_tokens, narrow=narrow)

    def block_attention(self, format: str, cached_tokens: int, *, narrow: bool = False) -> Attention:
        """See `Subjects`."""
        return block_attention_calls(format, cached_tokens, narrow=narrow)

    def stream(self) -> float:
        """See `Subjects`."""
        return stream_bytes_per_s()

    def read(self, block_nbytes: int, in_flight: int, blocks: int) -> float:
        """See `Subjects`."""
        return self._disk.read(block_nbytes, in_flight, blocks)

    def read_first(self, nbytes: int) -> float:
        """See `Subjects`."""
        return self._disk.read_first(nbytes)

    def beside_kernels(self, call: Callable[[], float], format: str, count: int, tokens: int) -> tuple[float, float]:
        """The call runs on a thread of its own, the kernels on this one until it returns.

        With one expert a call, as they are computed when they arrive, both threads of a call wait for each other more
        often.
        """
        experts = self._expert_calls(format).product(count, tokens)
        found: list[float] = []
        thread = threading.Thread(target=lambda: found.append(call()))
        with torch.no_grad():
            alone_s = repeated(experts.run, budget_s=_ALONE_S)
            with _waiting_shortly() if tokens == 1 else nullcontext():
                thread.start()
                beside_s = [_seconds(experts.run)]
                while thread.is_alive():
                    beside_s.append(_seconds(experts.run))
        thread.join()
        # The call ended within the last run.
        whole = beside_s[:-1] or beside_s
        return found[0], min(1.0, statistics.median(alone_s) * len(whole) / sum(whole))

    def between_reads(self, read: Callable[[], float], format: str) -> float:
        """Linear layers in a row, a layer's worth, right after the reads and right after each other; threads wait
        shortly beside reads, as they do while decode reads.
        """
        few = self.linear(format, _ROWS, 1).run
        few()
        alone_s = [_seconds(few) for _ in range(_BURSTS)]
        after_s = []
        with _waiting_shortly():
            for _ in range(_BURSTS):
                read()
                after_s.append(_seconds(few))
        return min(1.0, statistics.median(alone_s) / statistics.median(after_s))

    def small_pass(self, tokens: int) -> Callable[[], object]:
        """See `Subjects`."""
        if self._small is None:
            self._small = SmallModel(self._directory)
        return self._small.a_pass(tokens)

    def passes(self, profile: HardwareProfile, quant: str | None) -> WholePasses:
        """See `Subjects`."""

        def speeds() -> Speeds:
            return probe(self, profile, BF16.name if quant is None else quant, seconds=_BEFORE_PASSES_S)

        return measure_passes(profile, self._directory, self._repeats, quant, speeds, self._depths)


def _of_format(kept: dict[_Key, _Calls], format: str, key: _Key, make: Callable[[], _Calls]) -> _Calls:
    """Those that are kept, or new ones, and only of this format: they are large, and making them takes longer than
    measuring.
    """
    if any(calls.format != format for calls in kept.values()):
        kept.clear()
    if key not in kept:
        kept[key] = make()
    return kept[key]


@contextmanager
def _waiting_shortly() -> Iterator[None]:
    """Within the block threads give their cores up between regions, as they do while decode reads."""
    waits = short_waits()
    try:
        yield
    finally:
        if waits is not None:
            waits.close()


def _seconds(call: Callable[[], object]) -> float:
    before = perf_counter()
    call()
    return perf_counter() - before
