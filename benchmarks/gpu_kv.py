"""Attention of one new token to KV blocks in VRAM: at which share of the memory's bandwidth their bytes are read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu_timing import replayed, seconds_of
from benchmarks.harness import Report, Row, say
from formats.kv import KV_FORMATS, KvLayout
from formats.kv_pack import pack_kv_block
from gpu_kernels.paged_attention import paged_attention
from gpu_kernels.paged_attention_reference import paged_attention_reference
from placement.kv import SETTINGS

_TOLERANCE = 2.0**-7
_BANDWIDTH_SHARE = 0.7
_TURNS = 8


@dataclass(frozen=True)
class KvShape:
    """Heads of a model: of queries, of keys and values, and their channels, as of `KvLayout`."""

    name: str
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    value_from_key: int = 0


@dataclass(frozen=True)
class KvScale:
    """How much is measured.

    Attributes:
        formats: of blocks.
        shapes: of heads.
        tokens: of the one sequence; all blocks together are more than the card's L2 holds.
    """

    formats: tuple[str, ...]
    shapes: tuple[KvShape, ...]
    tokens: tuple[int, ...]


FULL = KvScale(
    KV_FORMATS,
    (
        KvShape("head 128, GQA 8", 32, 4, 128, 128),
        KvShape("head 128, GQA 4", 32, 8, 128, 128),
        KvShape("head 64, GQA 8", 64, 8, 64, 64),
        KvShape("MLA 512 + 64", 16, 1, 576, 0, 512),
    ),
    (32_768, 131_072),
)
QUICK = KvScale(("bf16", "int4"), (KvShape("tiny", 4, 2, 16, 16),), (200,))


def kv_table(report: Report, scale: KvScale, device: torch.device, bytes_per_s: float, rounds: int) -> list[Row]:
    """Gate each format and shape on float64, then time it.

    Args:
        report: to which gates and targets go.
        scale: how much.
        device: where.
        bytes_per_s: what its memory reaches.
        rounds: repeats.

    Raises:
        GateError: the output is not that of the reference.
    """
    rows: list[Row] = []
    for shape in scale.shapes:
        for format in scale.formats:
            say(f"attention to KV blocks, {format}, {shape.name}")
            layout = KvLayout(
                format, shape.kv_heads, shape.key_width, shape.value_width, SETTINGS.block_tokens, shape.value_from_key
            )
            _gate(report, shape, _History(layout, 3 * layout.block_tokens - 5, device))
            for tokens in scale.tokens:
                rows.append(_timed(report, shape, _History(layout, tokens, device), bytes_per_s, rounds))
    return rows


class _History:
    """One sequence in blocks of a slab, in segments as the runtime cuts them; all are copies of two."""

    def __init__(self, layout: KvLayout, tokens: int, device: torch.device) -> None:
        self.layout, self.tokens, self.device = layout, tokens, device
        self.blocks = [_block(layout, seed) for seed in range(2)]
        count = -(-tokens // layout.block_tokens)
        self.slab = torch.empty(count, layout.nbytes, dtype=torch.uint8, device=device)
        for parity, block in enumerate(self.blocks):
            self.slab[parity::2] = torch.from_numpy(block).to(device)
        firsts = np.arange(0, count, SETTINGS.segment_blocks)
        ends = np.minimum(firsts + SETTINGS.segment_blocks, count)
        size = layout.block_tokens
        lengths = np.minimum(ends * size, tokens) - firsts * size
        positions = np.full((len(firsts), 1), tokens - 1)
        addresses = self.slab.data_ptr() + np.arange(count) * layout.nbytes
        self.lists = len(firsts)
        self._told = [
            torch.from_numpy(numbers).to(device)
            for numbers in (np.append(firsts, count), addresses, lengths, firsts * size, positions)
        ]

    def query(self, shape: KvShape, seed: int) -> torch.Tensor:
        """bf16 [lists, heads, 1, width], of one token."""
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn(1, shape.heads, 1, shape.key_width, generator=generator).bfloat16()
        return query.expand(self.lists, -1, -1, -1).contiguous().to(self.device)

    def attend(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A part of each segment."""
        most = min(self.tokens, SETTINGS.segment_blocks * self.layout.block_tokens)
        offsets, addresses, lengths, firsts, positions = self._told
        scale = self.layout.key_width**-0.5
        return paged_attention(
            query, offsets, addresses, lengths, firsts, positions, self.layout, scale, most_tokens=most
        )


def _block(layout: KvLayout, seed: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    random = np.random.default_rng(seed)
    shape = layout.kv_heads, layout.block_tokens
    keys = random.standard_normal((*shape, layout.key_width)).astype(np.float32)
    values = None
    if not layout.value_from_key:
        values = random.standard_normal((*shape, layout.value_width)).astype(np.float32)
    return pack_kv_block(keys, values, layout)


def _gate(report: Report, shape: KvShape, history: _History) -> None:
    query, layout = history.query(shape, seed=0), history.layout
    found, _ = history.attend(query)
    count = len(history.slab)
    blocks = [history.blocks[index % 2] for index in range(count)]
    position = torch.tensor([[history.tokens - 1]])
    expected, _ = paged_attention_reference(
        query.cpu(), [blocks], [history.tokens], [0], position, layout, layout.key_width**-0.5
    )
    error = float((found.double().cpu() - expected).abs().max() / expected.abs().max())
    report.gate(
        f"attention, {layout.format}, {shape.name}", error <= _TOLERANCE,
        f"largest error {error:.2g} of the largest output, at most {_TOLERANCE:.2g}",
    )  # fmt: skip


def _timed(report: Report, shape: KvShape, history: _History, bytes_per_s: float, rounds: int) -> Row:
    """Some calls in one graph, so that blocks come from memory and not from L2."""
    queries = [history.query(shape, seed=turn) for turn in range(_TURNS)]
    device, layout = history.device, history.layout
    seconds = seconds_of(replayed(lambda turn: history.attend(queries[turn]), device, _TURNS), device, rounds)
    nbytes = _TURNS * history.slab.numel()
    share = nbytes / seconds.median / bytes_per_s
    report.target(
        f"attention, {layout.format}, {shape.name}, {history.tokens} tokens: share of bandwidth", share, "at least",
        _BANDWIDTH_SHARE,
    )  # fmt: skip
    return {
        "heads": shape.name,
        "format": layout.format,
        "tokens": history.tokens,
        "us_per_call": seconds.median / _TURNS * 1e6,
        "GB_per_s": nbytes / seconds.median / 1e9,
        "share_of_bandwidth": share,
    }
