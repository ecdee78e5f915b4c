"""A model so small that its passes are calls, not products: how fast what lies beside products is at a moment."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from offload.measuring.models import CACHED_TOKENS, CONTEXT_TOKENS, SIZES, loaded, random_model, run_pass

_LAYERS, _WIDTH = 2, 64
_SIZES: dict[str, Any] = SIZES | {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
}
_RAM_NBYTES = 1 << 30


class SmallModel:
    """Two layers with everything in RAM, in bf16, through the runtime.

    Attributes:
        runtime: of it.
    """

    def __init__(self, directory: Path) -> None:
        """Load it; its experts are written under a directory, and removed again by `close`."""
        with ExitStack() as stack:
            self._model, self.runtime = loaded(stack, directory, random_model(_LAYERS, _WIDTH, _SIZES), _RAM_NBYTES)
            self._stack = stack.pop_all()
        self._ids = torch.arange(CONTEXT_TOKENS)[None] % _SIZES["vocab_size"]
        self._cache, self._cached_tokens = DynamicCache(config=self._model.config), CONTEXT_TOKENS

    def a_pass(self, tokens: int) -> Callable[[], object]:
        """A pass of so many tokens: of one, the next of a sequence, which begins again where the context ends; of more,
        each of a new one.
        """

        @torch.no_grad()
        def prompt() -> None:
            run_pass(self._model, DynamicCache(config=self._model.config), self._ids[:, :tokens])

        return self._step if tokens == 1 else prompt

    @torch.no_grad()
    def _step(self) -> None:
        if self._cached_tokens >= CONTEXT_TOKENS:
            self._cache, self._cached_tokens = DynamicCache(config=self._model.config), CACHED_TOKENS
            run_pass(self._model, self._cache, self._ids[:, :CACHED_TOKENS])
        run_pass(self._model, self._cache, self._ids[:, self._cached_tokens : self._cached_tokens + 1])
        self._cached_tokens += 1

    def close(self) -> None:
        """Give all up."""
        self._stack.close()
