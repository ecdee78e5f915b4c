"""Generated tokens as text, as soon as they are text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

_INCOMPLETE = "\ufffd"


class TokenStreamer(BaseStreamer):
    """Writes the text of every token as it comes; what is written adds up to the text of all tokens.

    A token is decoded together with those before it back to the last write but one, so that a tokenizer that strips a
    leading space strips none inside the text, and bytes of one character wait for each other. transformers' own
    TextStreamer decodes each line by itself, which loses a space of indentation with SentencePiece tokenizers, and
    waits for the end of a word.

    Attributes:
        new_tokens: what was generated so far.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Callable[[str], object],
        *,
        echo: bool,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        """Start before the prompt.

        Args:
            tokenizer: of the model.
            write: takes each piece of text.
            echo: write the prompt too.
            check: called for every token; what it raises ends the generation.
        """
        self.new_tokens: list[int] = []
        self._tokenizer = tokenizer
        self._write = write
        self._echo = echo
        self._check = check
        self._prompt_is_next = True
        self._tokens: list[int] = []
        self._context = 0
        self._written = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and after it one token at a time."""
        tokens = [int(token) for token in value.flatten()]
        if not self._prompt_is_next:
            self.new_tokens += tokens
        if not self._prompt_is_next or self._echo:
            self._tokens += tokens
            self._write_new(final=False)
        self._prompt_is_next = False
        self._check()

    def end(self) -> None:
        """Write what was held back."""
        self._write_new(final=True)

    def _write_new(self, *, final: bool) -> None:
        before = self._decode(self._tokens[self._context : self._written])
        text = self._decode(self._tokens[self._context :])
        if len(text) > len(before) and (final or not text.endswith(_INCOMPLETE)):
            self._write(text[len(before) :])
            self._context, self._written = self._written, len(self._tokens)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
