"""What attention to a part of the KV cache did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SparsityCounters:
    """Counted since the start; a step is attention of one layer in one pass of few tokens.

    Attributes:
        sparse_steps: that left cached tokens out.
        full_steps: that attended to all, because a history was too short to choose from.
        measured: how often the share of exact attention was measured that the chosen tokens have.
        captured: sum of these shares.
        evicted_tokens: of all layers and sequences.
        refused: why attention stayed full, each reason once.
    """

    sparse_steps: int = 0
    full_steps: int = 0
    measured: int = 0
    captured: float = 0.0
    evicted_tokens: int = 0
    refused: set[str] = field(default_factory=set)

    def note_captured(self, share: float) -> None:
        """One measurement."""
        self.measured += 1
        self.captured += share
