"""`offload run`: from a prompt to text."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from offload.cli.errors import EXIT_INTERRUPTED, exit_codes
from offload.cli.interrupts import noted_interrupts
from offload.cli.options import (
    device_options,
    example,
    json_option,
    model_options,
    prefill_chunk_option,
    progress_option,
)
from offload.cli.output import write_json
from offload.cli.prompts import load_tokenizer, prompt_options, read_prompt, tokenize

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from offload.runtime import Runtime

Finish = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Settings:
    """The arguments and options, as click gives them; see the help texts."""

    model: str
    prompt: str | None
    prompt_file: Path | None
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    chat: bool
    echo: bool
    ram: int | None
    nvme: Path | None
    context: int | None
    dtype: str
    quant: str | dict[str, str | None] | None
    kv: str
    kv_ram: int | None
    kv_sparsity: str | None
    revision: str | None
    trust_remote_code: bool
    prefill_chunk: int | str
    device: str | None
    vram: int | None
    as_json: bool
    progress: bool | None


@dataclass(frozen=True)
class Generated:
    """The new tokens and why there are no more."""

    tokens: list[int]
    finish: Finish


@click.command(
    "run",
    short_help="Generate text from a prompt.",
    epilog=example(
        'offload run ./Qwen3-30B-A3B --chat -p "Why is the sky blue?" --ram 16GiB',
        "git diff | offload run ./Qwen3-30B-A3B -p - -n 200 --temperature 0.7",
    ),
)
@model_options
@prefill_chunk_option
@device_options
@prompt_options
@click.option(
    "-n",
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="N",
    help="Stop after so many tokens.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0,
    show_default=True,
    help="Above 0 samples; 0 always takes the likeliest token.",
)
@click.option("--top-k", type=click.IntRange(min=1), metavar="N", help="Sample from the N likeliest tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Sample from the likeliest tokens of this probability together.",
)
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Makes sampling repeatable.")
@click.option("--echo/--no-echo", default=False, show_default=True, help="Write the prompt before the text.")
@json_option
@progress_option
def run_command(**options: Any) -> None:
    """Generate text with MODEL, a directory or a Hub id.

    Text goes to stdout as it is generated, one line of figures to stderr. The first run converts the experts into a
    store, which later runs use.
    """
    settings = Settings(**options)
    with exit_codes(as_json=settings.as_json):
        prompt = read_prompt(settings.prompt, settings.prompt_file)
        if settings.temperature == 0 and (settings.top_k is not None or settings.top_p is not None):
            raise click.UsageError("--top-k and --top-p choose what to sample from; they need --temperature above 0.")
        _run(settings, prompt)


def _run(settings: Settings, prompt: str) -> None:
    from offload.checkpoint.locate import locate_checkpoint
    from offload.cli.libraries import quiet_transformers
    from offload.loading import load

    with quiet_transformers() if settings.progress is False else nullcontext():
        directory = locate_checkpoint(settings.model, revision=settings.revision)
    with quiet_transformers():
        tokenizer = load_tokenizer(directory, trust_remote_code=settings.trust_remote_code)
        inputs = tokenize(tokenizer, prompt, settings.model, chat=settings.chat)
        model = load(
            settings.model,
            ram=settings.ram,
            nvme=settings.nvme,
            dtype=settings.dtype,
            quant=settings.quant,
            kv=settings.kv,
            kv_ram=settings.kv_ram,
            kv_sparsity=settings.kv_sparsity,
            context=settings.context,
            prefill_chunk=settings.prefill_chunk,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            device=settings.device,
            vram=settings.vram,
            progress=settings.progress,
        )
        runtime = cast("Runtime", model.offload)
        with runtime:
            generated = _generate(model, tokenizer, inputs, settings)
            stats = runtime.stats()
    if settings.as_json:
        write_json(
            {
                "model": settings.model,
                "prompt_tokens": inputs["input_ids"].shape[1],
                "new_tokens": len(generated.tokens),
                "text": tokenizer.decode(generated.tokens, skip_special_tokens=True),
                "finish": generated.finish,
                "stats": stats.as_dict(),
                "plan": json.loads(runtime.plan.to_json()),
            }
        )
    else:
        click.echo(str(stats), err=True)
    if generated.finish == "interrupted":
        raise click.exceptions.Exit(EXIT_INTERRUPTED)


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: dict[str, torch.Tensor], settings: Settings
) -> Generated:
    """Generate, and write the text as it comes unless JSON is wanted."""
    import torch

    from offload.cli.streamer import TokenStreamer

    _note_length(model, inputs["input_ids"].shape[1] + settings.max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        sampling = {"do_sample": True, "temperature": settings.temperature}
        sampling |= {name: getattr(settings, name) for name in ("top_k", "top_p") if getattr(settings, name)}
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    interrupted = False
    with noted_interrupts() as check:
        write = _discard if settings.as_json else _write_text
        streamer = TokenStreamer(tokenizer, write, echo=settings.echo, check=check)
        try:
            model.generate(  # type: ignore[operator]
                **{name: tensor.to(model.device) for name, tensor in inputs.items()},
                **sampling,
                max_new_tokens=settings.max_new_tokens,
                num_beams=1,
                streamer=streamer,
            )
        except KeyboardInterrupt:
            interrupted = True
            streamer.end()
    if not settings.as_json:
        click.echo()
    if interrupted:
        finish: Finish = "interrupted"
    elif len(streamer.new_tokens) < settings.max_new_tokens or _is_end(model, streamer.new_tokens[-1]):
        finish = "stop"
    else:
        finish = "length"
    return Generated(streamer.new_tokens, finish)


def _note_length(model: PreTrainedModel, tokens: int) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        click.echo(f"Note: up to {tokens} tokens with the prompt; the model is made for {longest}.", err=True)


def _is_end(model: PreTrainedModel, token: int) -> bool:
    ends = model.generation_config.eos_token_id
    return token in (ends if isinstance(ends, list) else [ends])


def _write_text(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _discard(_text: str) -> None:
    pass
