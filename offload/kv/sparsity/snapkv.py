"""A part of the prompt, chosen by its last tokens (SnapKV, Li et al., 2024): lossy; the rest is forgotten.

When the first token after a prompt comes, the prompt's last 32 queries vote, each with its attention, summed over the
query heads that share a key. Votes are pooled over 7 neighbours, and each key-value head keeps the tokens with most.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from offload.kv.attention import parts_in_place
from offload.kv.sparsity.base import TableSparsity

if TYPE_CHECKING:
    from offload.kv.table import BlockTable

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]

WINDOW_TOKENS = 32
POOLED_TOKENS = 7


class SnapKv(TableSparsity):
    """Keeps a share of the first prompt, once; tokens after it stay.

    A prompt ends where a pass of few tokens follows. The window of queries and the tokens that are in it are kept.
    """

    watches_prompts = True

    def __init__(self, share: float) -> None:
        """One of an empty table.

        Args:
            share: of the prompt's tokens that are kept, above 0 and at most 1; the window counts.
        """
        self._share = share
        self._window: torch.Tensor | None = None
        self._prompt_tokens = 0
        self._done = False

    def watch(self, table: BlockTable, query: torch.Tensor, scale: float, valid: Bool | None) -> None:
        """Keep the last queries."""
        if self._done:
            return
        seen = query if self._window is None else torch.cat([self._window, query], 2)
        self._window = seen[:, :, -WINDOW_TOKENS:].detach().clone()
        self._prompt_tokens = table.tokens

    def attend(
        self, table: BlockTable, query: torch.Tensor, scale: float, valid: Bool | None, sinks: torch.Tensor | None
    ) -> torch.Tensor | None:
        """See there; always None, for what is left is attended to as it is."""
        counters = table.pool.counters.sparsity
        if self._window is not None:
            window, self._window, self._done = self._window, None, True
            with table.pool.use():
                self._compress(table, window, scale, valid)
        if table.evicted is None:
            counters.full_steps += 1
        else:
            counters.sparse_steps += 1
        return None

    def _compress(self, table: BlockTable, window: torch.Tensor, scale: float, valid: Bool | None) -> None:
        """Let the table hold the best tokens of each head, those of the window, and what came after."""
        old, refused = self._prompt_tokens - window.shape[2], table.pool.counters.sparsity.refused
        count = int(np.ceil(self._share * self._prompt_tokens)) - window.shape[2]
        if not 0 < count < old:
            return
        if valid is not None and not valid[:, old : self._prompt_tokens].all():
            refused.add("snapkv: padding among a prompt's last tokens")
            return
        votes = _votes(table, window, scale, valid, self._prompt_tokens, old)
        pooled = torch.nn.functional.max_pool1d(votes, POOLED_TOKENS, 1, POOLED_TOKENS // 2)
        seen = torch.ones(table.sequences, 1, old, dtype=torch.bool)
        if valid is not None:
            seen = torch.from_numpy(valid[:, None, :old])
            # Of a sequence that has fewer, padding is kept.
            pooled.masked_fill_(~seen, -1.0)
        chosen = pooled.topk(count, 2).indices.sort(2).values
        kept = seen.expand(-1, chosen.shape[1], -1).gather(2, chosen)
        if not bool((kept == kept[:, :1]).all()):
            refused.add("snapkv: padding between a prompt's tokens")
            return
        lost = votes.sum(2) - votes.gather(2, chosen).sum(2)
        each = window.shape[1] // votes.shape[1] * window.shape[2]
        table.pool.counters.sparsity.note_captured(1 - float(lost.mean()) / each)
        keys, values = _gather(table, chosen, old)
        own = None if table.layouts.plain.value_from_key else values
        front = torch.cat([kept[:, 0], torch.ones(table.sequences, window.shape[2], dtype=torch.bool)], 1)
        table.rewrite(keys, own, front.numpy())

    def select(self, rows: Int64) -> None:
        """See there."""
        if self._window is not None:
            self._window = self._window[torch.from_numpy(rows)]

    def cut(self, table: BlockTable) -> None:
        """See there: the prompt ends earlier."""
        taken = self._prompt_tokens - table.tokens
        if self._window is None or taken <= 0:
            return
        left = self._window.shape[2] - taken
        self._window = self._window[:, :, :left] if left > 0 else None
        self._prompt_tokens = table.tokens

    def copy(self) -> SnapKv:
        """See there."""
        other = SnapKv(self._share)
        other._window, other._prompt_tokens, other._done = self._window, self._prompt_tokens, self._done
        return other


def _spans(table: BlockTable, tokens: int) -> Iterator[tuple[int, int]]:
    """The first and the one after the last token of pieces that are read at once."""
    step = table.settings.segment_blocks * table.settings.block_tokens
    return ((first, min(first + step, tokens)) for first in range(0, tokens, step))


def _votes(
    table: BlockTable, window: torch.Tensor, scale: float, valid: Bool | None, prompt_tokens: int, old: int
) -> torch.Tensor:
    """Attention of a prompt's last queries to the first `old` tokens, summed over queries and heads: [B, Hk, old]."""
    columns = -(-prompt_tokens // table.settings.block_tokens)
    positions = np.arange(old, prompt_tokens)
    held = table.held_valid(valid)
    parts = parts_in_place(table, window, scale, valid=held, positions=positions, columns=(0, columns), ahead=False)
    lse = parts[1].logsumexp(1)
    kv_heads, width = table.layouts.plain.kv_heads, window.shape[3]
    rows = []
    for row in range(table.sequences):
        queries = window[row].float().reshape(kv_heads, -1, width)
        total = lse[row].reshape(kv_heads, -1, 1)
        found = []
        for first, end in _spans(table, old):
            scores = scale * queries @ table.read(row, first, end)[0].mT
            found.append(torch.exp(scores - total).sum(1))
        rows.append(torch.cat(found, 1))
    votes = torch.stack(rows)
    return votes if held is None else votes.masked_fill_(~torch.from_numpy(held[:, None, :old]), 0.0)


def _gather(table: BlockTable, chosen: torch.Tensor, old: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of chosen tokens [B, Hk, K] and of all from `old` on."""
    rows = []
    for row in range(table.sequences):
        kept = []
        for first, end in _spans(table, old):
            both = table.read(row, first, end)
            # Of each head, ascending tokens of this piece, as many as there are.
            per_head = [mine[(mine >= first) & (mine < end)] - first for mine in chosen[row]]
            kept.append([[part[head, at] for head, at in enumerate(per_head)] for part in both])
        newest = table.read(row, old, table.tokens)
        rows.append(
            [
                torch.stack([torch.cat([piece[side][head] for piece in kept]) for head in range(chosen.shape[1])])
                for side in (0, 1)
            ]
        )
        rows[-1] = [torch.cat([front, back], 1) for front, back in zip(rows[-1], newest, strict=True)]
    keys, values = (torch.stack([row[side] for row in rows]) for side in (0, 1))
    return keys, values
