"""The forward passes that a workload is made of."""

from __future__ import annotations

from dataclasses import dataclass

from placement.workload import Workload


@dataclass(frozen=True)
class Pass:
    """Forward passes of one kind.

    Attributes:
        batch: sequences.
        new_tokens: of each sequence.
        cached_tokens: of each sequence, before; the mean where there are several passes.
        count: how many such passes.
    """

    batch: int
    new_tokens: int
    cached_tokens: float
    count: int = 1

    @property
    def rows(self) -> int:
        """Tokens that go through the model at once."""
        return self.batch * self.new_tokens

    def visible_tokens(self, window: int | None) -> float:
        """Cached and new tokens of a sequence that the last new token attends to."""
        seen = self.cached_tokens + self.new_tokens
        return seen if window is None else min(seen, float(window))

    def attended_pairs(self, window: int | None) -> float:
        """Pairs of a new token and one that it attends to, of one sequence."""
        if window is None:
            return self.new_tokens * (self.cached_tokens + (self.new_tokens + 1) / 2)
        # Tokens before the window is full see all there is, later ones the window.
        growing = min(max(window - self.cached_tokens, 0.0), float(self.new_tokens))
        return growing * (self.cached_tokens + (growing + 1) / 2) + (self.new_tokens - growing) * window


def decode_pass(workload: Workload) -> Pass:
    """One new token for each sequence, half-way through the new tokens."""
    return Pass(workload.batch, 1, float(workload.cached_tokens))


def prefill_passes(workload: Workload) -> list[Pass]:
    """The prompt of every sequence in chunks."""
    prompt = min(workload.prompt_tokens, workload.context_tokens)
    chunk = workload.prefill_chunk_tokens
    whole, rest = divmod(prompt, chunk)
    passes = []
    if whole:
        passes.append(Pass(workload.batch, chunk, (whole - 1) * chunk / 2, whole))
    if rest:
        passes.append(Pass(workload.batch, rest, float(whole * chunk)))
    return passes
