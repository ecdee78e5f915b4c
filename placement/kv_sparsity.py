"""Attention to a part of a KV cache: lossy, and only where it is asked for."""

from __future__ import annotations

from dataclasses import dataclass

SPARSITY_METHODS = ("top-k", "snapkv", "h2o")
"""What `kv_sparsity=` may name."""


@dataclass(frozen=True)
class KvSparsity:
    """Which of the cached tokens are attended to, or kept at all.

    Attributes:
        method: of SPARSITY_METHODS. "top-k" keeps all tokens and attends to the best blocks; "snapkv" keeps a part of
            the prompt, once it is read; "h2o" keeps a part of all blocks.
        share: of the tokens or blocks, above 0 and at most 1.
    """

    method: str
    share: float

    @property
    def evicts(self) -> bool:
        """Whether tokens are forgotten."""
        return self.method != "top-k"

    @classmethod
    def parse(cls, text: str) -> KvSparsity:
        """Of what `str` gives; neither name nor share is checked.

        Raises:
            ValueError: the share is no number.
        """
        method, _, share = text.partition(":")
        return cls(method, float(share))

    def __str__(self) -> str:
        return f"{self.method}:{self.share:g}"
