"""Prompts of commands that run a model: where they come from, and their tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_Command = TypeVar("_Command", bound=Callable[..., Any])

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")

_OPTIONS = (
    click.option("-p", "--prompt", metavar="TEXT", help='The prompt; "-" reads it from stdin.'),
    click.option("--prompt-file", type=click.Path(path_type=Path), metavar="FILE", help="Read the prompt from FILE."),
    click.option("--chat", is_flag=True, help="Put the prompt into the tokenizer's chat template."),
)


def prompt_options(command: _Command) -> _Command:
    """-p, --prompt-file and --chat."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The text of whichever of -p and --prompt-file was given.

    Raises:
        click.UsageError: neither or both were, or what was given is empty or no text.
    """
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError('Give the prompt, either with -p TEXT (or "-p -" for stdin) or with --prompt-file FILE.')
    try:
        if prompt_file is not None:
            prompt = prompt_file.read_bytes().decode()
        elif prompt == "-":
            prompt = sys.stdin.buffer.read().decode()
        else:
            prompt = prompt or ""
            prompt.encode()
    except UnicodeError as error:
        raise click.UsageError(f"The prompt is not UTF-8: {error}.") from error
    except OSError as error:
        raise click.UsageError(f"The prompt cannot be read: {error}.") from error
    if not prompt:
        raise click.UsageError("The prompt is empty.")
    return prompt


def load_tokenizer(directory: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        CheckpointError: there is none, or one that transformers cannot read.
    """
    from transformers import AutoTokenizer

    from offload.errors import CheckpointError

    fix = "Fix: put the model's tokenizer files there"
    # Without any file transformers makes a tokenizer that knows no word.
    if not any(next(directory.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        raise CheckpointError(f"{directory}: expected a tokenizer, found none. {fix}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # tokenizers raises nothing more specific for a file that it cannot read
        raise CheckpointError(
            f"{directory}: expected a tokenizer that transformers can read, found one that it cannot ({error}). {fix}"
        ) from error
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str, model: str, *, chat: bool) -> dict[str, torch.Tensor]:
    """Token ids and attention mask of one sequence.

    Args:
        tokenizer: of the model.
        prompt: text.
        model: its name, for messages.
        chat: put the text into the tokenizer's chat template.

    Raises:
        click.UsageError: no template, or no tokens.
    """
    encoded: Any
    if chat:
        if not tokenizer.chat_template:
            raise click.UsageError(f"The tokenizer of {model} has no chat template: leave --chat out.")
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    if encoded["input_ids"].numel() == 0:
        raise click.UsageError("The prompt has no tokens.")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
