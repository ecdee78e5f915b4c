from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from offload.cli.streamer import TokenStreamer

PIECES = ["<s>", "</s>", "▁def", "▁f", "f", "():", "<0x0A>", "▁▁▁", "▁return", "▁", "x", "日", "ing"]
BYTES = [f"<0x{byte:02X}>" for byte in "é€🙂".encode()]
TEXT = ["▁def", "▁f", "():", "<0x0A>", "▁▁▁", "▁return", "▁", "x", "ing", "<0x0A>", "▁▁▁", "日", *BYTES, "x"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Decodes as Llama's and Mixtral's do: spaces are pieces, bytes are tokens, a leading space is stripped."""
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(PIECES + BYTES))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def stream(tokenizer: PreTrainedTokenizerFast, prompt: list[int], new: list[int], *, echo: bool) -> list[str]:
    written: list[str] = []
    streamer = TokenStreamer(tokenizer, written.append, echo=echo)
    streamer.put(torch.tensor([prompt]))
    for token in new:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert streamer.new_tokens == new
    return written


@pytest.mark.parametrize("cut", range(1, len(TEXT)))
def test_pieces_add_up_to_the_text_of_all_tokens(tokenizer: PreTrainedTokenizerFast, cut: int) -> None:
    tokens = tokenizer.convert_tokens_to_ids(TEXT)
    prompt, new = tokens[:cut], tokens[cut:]
    assert "".join(stream(tokenizer, prompt, new, echo=False)) == tokenizer.decode(new)
    assert "".join(stream(tokenizer, prompt, new, echo=True)) == tokenizer.decode(tokens)


def test_every_token_is_written_when_it_comes(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_tokens_to_ids(["▁def", "▁f", "():", "x", "ing"])
    assert stream(tokenizer, [0], tokens, echo=False) == ["def", " f", "():", "x", "ing"]


def test_the_bytes_of_one_character_wait_for_each_other(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_tokens_to_ids(BYTES)
    assert stream(tokenizer, [0], tokens, echo=False) == ["é", "€", "🙂"]


def test_half_a_character_is_written_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_tokens_to_ids(["x", BYTES[0]])
    assert stream(tokenizer, [0], tokens, echo=False) == ["x", "\ufffd"]


def test_special_tokens_are_not_text(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_tokens_to_ids(["x", "<s>", "▁f", "</s>"])
    assert "".join(stream(tokenizer, [0], tokens, echo=True)) == "x f"
