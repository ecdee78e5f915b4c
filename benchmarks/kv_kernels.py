"""Decode attention over KV blocks: every format beside the memory's read bandwidth and the kernel's own arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.equality import gate_close, relative_rms
from benchmarks.harness import Report, Spread, interleave, ratios, say
from benchmarks.machine import require_memory
from cpu_kernels.block_selection import attend_to_blocks, choose_blocks
from cpu_kernels.key_sketch import estimate_largest_scores, sketch_blocks
from cpu_kernels.paged_attention import paged_attention
from cpu_kernels.paged_attention_reference import paged_attention_reference
from cpu_kernels.prepared_attention import PreparedAttention, one_list, rows_elements
from formats.key_sketch import SketchLayout
from formats.kv import KV_FORMATS, KvLayout
from formats.kv_pack import pack_kv_block
from offload.devices.host_threads import kernel_pool

TARGET = 0.8
SELECTED = 0.05
TOLERANCE = 1e-5
# A few rows of these are multiplied with weights of 16 bits.
ROUNDED_TOLERANCE = 2e-4
_BLOCKS_KINDS = 4
_GATE_BLOCKS = 12
# More than the last-level cache holds, of any format.
_STEPS = 16


@dataclass(frozen=True)
class Shape:
    """One kind of attention.

    Attributes:
        name: of the table.
        group: query heads of a key-value head.
        layout: (kv_heads, key_width, value_width, block_tokens, value_from_key).
    """

    name: str
    group: int
    layout: tuple[int, int, int, int, int]


def _grouped(group: int, width: int) -> Shape:
    return Shape(f"head {width}, GQA {group}", group, (512 // width, width, width, 64, 0))


_LATENT = Shape("MLA 512 + 64, 16 heads", 16, (1, 576, 0, 64, 512))
SHAPES = (*(_grouped(group, width) for width in (64, 128) for group in (1, 4, 8)), _LATENT)


@dataclass(frozen=True)
class KvScale:
    """How much is measured.

    Attributes:
        cold_nbytes: blocks that calls go through in turn.
        contexts: tokens of a history.
        shapes: kinds of attention.
        formats: of blocks.
        selected: names of shapes for which attention to a few blocks is measured too.
        selected_contexts: tokens of a history for that.
        rounds: repeats.
    """

    cold_nbytes: int
    contexts: tuple[int, ...]
    shapes: tuple[Shape, ...]
    formats: tuple[str, ...]
    selected: tuple[str, ...]
    selected_contexts: tuple[int, ...]
    rounds: int


_COMMON = "head 128, GQA 4"
FULL = KvScale(640 << 20, (8192, 32768, 131072), SHAPES, KV_FORMATS, (_COMMON,), (32768, 131072), 3)
QUICK = KvScale(1 << 20, (256,), (_grouped(4, 128), _LATENT), ("bf16", "int4"), (_COMMON,), (256,), 2)


@dataclass
class _Histories:
    """Blocks in memory, and as many addresses of only a few of them.

    Attributes:
        layout: of the blocks.
        query: [1, Hq, 1, D].
        addresses: of all blocks.
        few: as many, of blocks that stay in the second-level cache.
        blocks: of one history.
    """

    layout: KvLayout
    query: torch.Tensor
    addresses: npt.NDArray[np.int64]
    few: npt.NDArray[np.int64]
    blocks: int

    def attend(self, addresses: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """One decode step."""
        tokens = len(addresses) * self.layout.block_tokens
        offsets, length = np.array([0, len(addresses)]), np.array([tokens])
        first, position = np.zeros(1, np.int64), np.array([[tokens - 1]])
        scale = self.layout.key_width**-0.5
        return paged_attention(
            self.query, offsets, addresses, length, first, position, self.layout, scale, pool=kernel_pool()
        )

    def seconds(self, addresses: npt.NDArray[np.int64]) -> float:
        """Mean seconds of a step as decoding makes it, over steps that go through different blocks."""
        steps = min(len(addresses) // self.blocks, _STEPS)
        prepared = [self._prepare(addresses[step * self.blocks : (step + 1) * self.blocks]) for step in range(steps)]
        tokens, pool = self.blocks * self.layout.block_tokens, kernel_pool()
        before = perf_counter()
        for history in prepared:
            history.attend(self.query, tokens, tokens - 1, pool)
        return (perf_counter() - before) / steps

    def _prepare(self, addresses: npt.NDArray[np.int64]) -> PreparedAttention:
        """What decoding keeps from one token to the next."""
        layout, heads = self.layout, self.query.shape[1]
        return PreparedAttention(
            one_list(layout, addresses), layout.key_width**-0.5, torch.empty(rows_elements(layout, 1, heads)),
            torch.empty(1, heads, 1, layout.output_width), torch.empty(1, heads, 1),
        )  # fmt: skip


def _fill(layout: KvLayout, memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Addresses of blocks that fill the memory; a few kinds of content again and again."""
    generator = np.random.default_rng(0)
    start = -memory.ctypes.data % 4096
    count = (len(memory) - start) // layout.nbytes
    lying = memory[start : start + count * layout.nbytes].reshape(count, layout.nbytes)
    for kind in range(_BLOCKS_KINDS):
        shape = (layout.kv_heads, layout.block_tokens)
        keys = generator.standard_normal((*shape, layout.key_width)).astype(np.float32)
        values = generator.standard_normal((*shape, max(layout.value_width, 1))).astype(np.float32)
        lying[kind::_BLOCKS_KINDS] = pack_kv_block(keys, values if layout.value_width else None, layout)
    return lying.ctypes.data + np.arange(count, dtype=np.int64) * layout.nbytes


def _tolerance(layout: KvLayout) -> float:
    return ROUNDED_TOLERANCE if layout.has_pairs else TOLERANCE


def _gate(report: Report, title: str, histories: _Histories) -> None:
    addresses = histories.addresses[:_GATE_BLOCKS]
    found, _ = histories.attend(addresses)
    tokens = len(addresses) * histories.layout.block_tokens
    exact, _ = paged_attention_reference(
        histories.query, np.array([0, len(addresses)]), addresses, np.array([tokens]), np.zeros(1, np.int64),
        np.array([[tokens - 1]]), histories.layout, histories.layout.key_width**-0.5,
    )  # fmt: skip
    gate_close(report, title, found.double().numpy(), exact.numpy(), relative_rms, _tolerance(histories.layout))


def run(scale: KvScale) -> Report:
    """The benchmark."""
    report = Report("kv_kernels")
    require_memory(3 * scale.cold_nbytes, "blocks of a KV cache")
    memory = np.empty(scale.cold_nbytes + 4096, np.uint8)
    stream = torch.ones(scale.cold_nbytes // 4)
    for shape in scale.shapes:
        say(shape.name)
        for format in scale.formats:
            layout = KvLayout(format, *shape.layout)
            addresses = _fill(layout, memory)
            query = torch.randn(1, shape.group * layout.kv_heads, 1, layout.key_width)
            selects = shape.name in scale.selected and not layout.value_from_key
            for context in sorted({*scale.contexts, *(scale.selected_contexts if selects else ())}):
                blocks = context // layout.block_tokens
                used = addresses[: max(1, len(addresses) // blocks) * blocks]
                if len(used) < blocks:
                    report.notes.append(f"{shape.name}, {format}: {context} tokens do not fit the measured memory.")
                    continue
                few = np.tile(addresses[:1], len(used))
                histories = _Histories(layout, query, used, few, blocks)
                if context in scale.contexts:
                    _measure(report, shape, histories, stream, scale)
                if selects and context in scale.selected_contexts:
                    _measure_selection(report, histories, scale.rounds)
    pool = kernel_pool()
    report.notes.append(
        f"Threads: {pool.threads}. Calls go through {scale.cold_nbytes / 2**20:.0f} MiB of blocks in turn; the stream "
        "is torch's sum of as many bytes, in the same round. In cache: the same call, all of whose addresses are of "
        "one block, so that nothing but arithmetic takes time. Share of bound: the larger bound over the time."
    )
    return report


def _measure(report: Report, shape: Shape, histories: _Histories, stream: torch.Tensor, scale: KvScale) -> None:
    layout = histories.layout
    context = histories.blocks * layout.block_tokens
    title = f"{shape.name}, {layout.format}, {context} tokens"
    _gate(report, title, histories)
    turns: dict[str, Callable[[], float]] = {
        "stream": partial(_stream, stream),
        "cold": partial(histories.seconds, histories.addresses),
        "cached": partial(histories.seconds, histories.few),
    }
    seconds = interleave(turns, scale.rounds)
    nbytes = histories.blocks * layout.kv_heads * layout.head_nbytes
    products = context * layout.kv_heads * shape.group * (layout.key_width + layout.output_width)
    streamed = [stream.nbytes / value for value in seconds["stream"]]
    shares = [nbytes / value / most for value, most in zip(seconds["cold"], streamed, strict=True)]
    bounds = [
        max(nbytes / most, cached) / value
        for value, cached, most in zip(seconds["cold"], seconds["cached"], streamed, strict=True)
    ]
    report.tables.setdefault(shape.name, []).append(
        {
            "context": context,
            "format": layout.format,
            "us": Spread.of([1e6 * value for value in seconds["cold"]]),
            "GB/s": Spread.of([nbytes / value / 1e9 for value in seconds["cold"]]),
            "share of stream": Spread.of(shares),
            "G products/s in cache": Spread.of([products / value / 1e9 for value in seconds["cached"]]),
            "share of bound": Spread.of(bounds),
        }
    )
    report.target(f"{title}: share of stream", Spread.of(shares).median, "at least", TARGET)


def _measure_selection(report: Report, histories: _Histories, rounds: int) -> None:
    """A step that attends to the best blocks by landmarks, the choice included, beside one that attends to all."""
    layout, blocks = histories.layout, histories.blocks
    title = f"{SELECTED:.0%} of blocks by landmarks, {layout.format}, head {layout.key_width}"
    sketch = SketchLayout(layout.key_width, layout.block_tokens)
    shape = layout.kv_heads, layout.block_tokens, layout.key_width
    keys = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sketches = sketch_blocks(keys, sketch)[None, :, None].repeat(1, 1, blocks, 1)
    addresses = histories.addresses[:blocks]
    count = max(1, round(SELECTED * blocks))
    all_chosen = choose_blocks(torch.zeros(1, layout.kv_heads, blocks), blocks)

    def attend(chosen: npt.NDArray[np.int64]) -> torch.Tensor:
        out, _ = attend_to_blocks(
            histories.query, addresses[None], chosen, layout, layout.key_width**-0.5, pool=kernel_pool()
        )
        return out

    def selected() -> float:
        before = perf_counter()
        attend(choose_blocks(estimate_largest_scores(histories.query, sketches, sketch, kernel_pool()), count))
        return perf_counter() - before

    found, exact = attend(all_chosen).double().numpy(), histories.attend(addresses)[0].double().numpy()
    gate_close(report, f"{title}, all chosen", found, exact, relative_rms, _tolerance(layout))
    turns: dict[str, Callable[[], float]] = {"all": partial(histories.seconds, addresses), "selected": selected}
    seconds = interleave(turns, max(3, rounds))
    report.tables.setdefault(title, []).append(
        {
            "context": blocks * layout.block_tokens,
            "all, us": Spread.of([1e6 * value for value in seconds["all"]]),
            "selected, us": Spread.of([1e6 * value for value in seconds["selected"]]),
            "times as fast": ratios(seconds["all"], seconds["selected"]),
        }
    )


def _stream(stream: torch.Tensor) -> float:
    before = perf_counter()
    stream.sum()
    return perf_counter() - before
