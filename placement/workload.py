"""What the user will run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """The shape of the work that a plan is made for.

    Attributes:
        context_tokens: longest sequence (prompt and new tokens) that the KV share must hold, per sequence.
        batch: sequences at once.
        prefill_chunk_tokens: prompt tokens (of one sequence) that go through the model at once; longer prompts are
            cut into chunks of this size. It is part of the workload, not of the placement: the same request must
            give the same output under every budget.
        prompt_tokens: of each sequence; with `new_tokens` what predictions and choices are made for.
        new_tokens: that follow the prompt, for each sequence.
    """

    context_tokens: int
    batch: int = 1
    prefill_chunk_tokens: int = 1024
    prompt_tokens: int = 512
    new_tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("context_tokens", "batch", "prefill_chunk_tokens", "prompt_tokens", "new_tokens"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    @property
    def cached_tokens(self) -> int:
        """Tokens of a sequence that are cached half-way through its new tokens, within the context."""
        return min(self.context_tokens, self.prompt_tokens + self.new_tokens // 2)
