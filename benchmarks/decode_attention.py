"""Attention of one token to a cache in one piece, beside torch's and the memory's read bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from torch.nn import functional as F

from benchmarks.equality import gate_close, relative_rms
from benchmarks.harness import Report, Row, Spread, interleave, ratios, say
from benchmarks.machine import require_memory, stream_speed
from cpu_kernels.decode_attention import decode_attention
from cpu_kernels.decode_attention_reference import decode_attention_reference
from offload.devices.host_threads import kernel_pool

_KV_HEADS_WIDTH = 512
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
_MOST_CALLS = 64
_SHARE = 0.8


@dataclass(frozen=True)
class AttentionScale:
    """How much is measured.

    Attributes:
        cold_nbytes: keys and values that calls go through in turn.
        contexts: cached tokens.
        widths: of heads; together key-value heads are 512 wide.
        groups: query heads of a key-value head.
        rounds: repeats.
    """

    cold_nbytes: int
    contexts: tuple[int, ...]
    widths: tuple[int, ...]
    groups: tuple[int, ...]
    rounds: int


FULL = AttentionScale(320 << 20, (512, 8192, 32768), (64, 128), (1, 4, 8), 7)
QUICK = AttentionScale(1 << 20, (96,), (64,), (1, 4), 2)


@dataclass
class _Caches:
    """Keys and values of as many caches as there is memory for, and a query."""

    query: torch.Tensor
    states: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def nbytes(self) -> int:
        """Of one cache."""
        return sum(part.nbytes for part in self.states[0])

    def seconds(self, attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        """Mean seconds of a call, each with another cache."""
        before = perf_counter()
        for key, value in self.states:
            attend(self.query, key, value)
        return (perf_counter() - before) / len(self.states)


def run(scale: AttentionScale) -> Report:
    """The benchmark."""
    report = Report("decode_attention")
    require_memory(3 * scale.cold_nbytes, "keys and values")
    stream = torch.ones(scale.cold_nbytes // 4)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for width in scale.widths:
            for group in scale.groups:
                say(f"{name}, head {width}, GQA {group}")
                for context in scale.contexts:
                    row = _measured(report, _caches(dtype, width, group, context, scale), stream, scale.rounds)
                    sizes = {"head": width, "GQA": group, "tokens": context}
                    report.tables.setdefault(name, []).append({**sizes, **row})
    report.notes.append(
        f"Threads: {kernel_pool().threads}. Key-value heads are {_KV_HEADS_WIDTH} channels together, batch 1; calls go "
        f"through {scale.cold_nbytes >> 20} MiB of keys and values in turn; the stream is torch's sum of as many bytes."
    )
    return report


def _caches(dtype: torch.dtype, width: int, group: int, context: int, scale: AttentionScale) -> _Caches:
    kv_heads = _KV_HEADS_WIDTH // width
    nbytes = 2 * kv_heads * context * width * dtype.itemsize
    count = min(_MOST_CALLS, max(1, scale.cold_nbytes // nbytes))
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, kv_heads, context, width, generator=generator).to(dtype) for _ in range(2))
    query = torch.randn(1, kv_heads * group, 1, width, generator=generator).to(dtype)
    return _Caches(query, [(key.clone(), value.clone()) for _ in range(count)])


def _ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return decode_attention(query, key, value, query.shape[3] ** -0.5, kernel_pool())


def _torchs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] > key.shape[1])


def _measured(report: Report, caches: _Caches, stream: torch.Tensor, rounds: int) -> Row:
    query, (key, value) = caches.query, caches.states[0]
    exact = decode_attention_reference(query, key, value, query.shape[3] ** -0.5)
    title = f"{query.dtype}, {tuple(query.shape)} to {tuple(key.shape)}"
    gate_close(
        report, title, _ours(query, key, value).double().numpy(), exact.numpy(), relative_rms, _TOLERANCE[query.dtype]
    )
    turns: dict[str, Callable[[], float]] = {
        "stream": lambda: 1 / stream_speed(stream),
        "ours": partial(caches.seconds, _ours),
        "torch": partial(caches.seconds, _torchs),
    }
    seconds = interleave(turns, rounds)
    nbytes = caches.nbytes
    shares = [nbytes / one * a_byte_s for one, a_byte_s in zip(seconds["ours"], seconds["stream"], strict=True)]
    faster = ratios(seconds["torch"], seconds["ours"])
    report.target(f"{title}: share of stream", Spread.of(shares).median, "at least", _SHARE)
    report.target(f"{title}: torch's time over ours", faster.median, "at least", 1.0)
    return {
        "us": Spread.of([1e6 * one for one in seconds["ours"]]),
        "GB/s": Spread.of([nbytes / one / 1e9 for one in seconds["ours"]]),
        "share of stream": Spread.of(shares),
        "torch us": Spread.of([1e6 * one for one in seconds["torch"]]),
        "times as fast as torch": faster,
    }
