from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from offload.cli import cli
from tests.tiny_models import build_tiny

PROMPT = "a = b + "
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]

Invoke = Callable[..., Result]


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character: with the special ones, the 99 of the tiny models."""
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: index for index, token in enumerate(SPECIAL + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, as `save_pretrained` writes them; not to be changed."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny("qwen3_moe").save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root of stores that all runs may use and none damages."""
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="session")
def expected(checkpoint: Path) -> str:
    """The 40 tokens that transformers itself generates greedily after PROMPT, as text."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=40, do_sample=False
        )
    text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(set(text) & set(string.printable)) > 5
    return str(text)


@pytest.fixture
def invoke() -> Invoke:
    """Run the command line in this process: arguments → result with exit_code, stdout and stderr."""

    def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=stdin, prog_name="offload")

    return run
