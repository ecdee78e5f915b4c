"""`offload trace`: record the routing of a run, and show what a trace says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from offload.cli.errors import exit_codes
from offload.cli.options import example, json_option, model_options, progress_option
from offload.cli.output import add_row, facts, table, write, write_json
from offload.cli.prompts import load_tokenizer, prompt_options, read_prompt, tokenize
from offload.sizes import format_size

if TYPE_CHECKING:
    from offload.runtime import Runtime
    from offload.trace_summary import TraceSummary


@click.group(
    "trace",
    short_help="Record and show which experts tokens go to.",
    epilog=example(
        "offload trace record ./Qwen3-30B-A3B -p 'Once' --ram 16GiB -o text.trace", "offload trace show text.trace"
    ),
)
def trace_commands() -> None:
    """Routing traces: which experts every token of a run went to.

    `offload plan --trace` and `offload bench --trace` take hit rates from one.
    """


@trace_commands.command(
    "record",
    short_help="Run a model and write its routing.",
    epilog=example(
        "offload trace record ./Qwen3-30B-A3B --prompt-file chapter.txt -n 512 --ram 16GiB -o text.trace",
    ),
)
@model_options
@prompt_options
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of sampling.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE", help="The trace."
)
@json_option
@progress_option
def record_command(as_json: bool, **options: Any) -> None:
    """Generate text with MODEL as `run` does, and write which experts every token went to.

    FILE is replaced. The text is not kept; its name in the trace is the model's and the prompt's length.
    """
    with exit_codes(as_json=as_json):
        _record(as_json=as_json, **options)


def _record(
    *,
    as_json: bool,
    prompt: str | None,
    prompt_file: Path | None,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    output: Path,
    model: str,
    revision: str | None,
    trust_remote_code: bool,
    progress: bool | None,
    **load_options: Any,
) -> None:
    from offload.written_files import check_place

    check_place(output)
    text = read_prompt(prompt, prompt_file)
    import torch

    from offload.checkpoint.locate import locate_checkpoint
    from offload.cli.libraries import quiet_transformers
    from offload.loading import load
    from offload.traces import write_trace

    with quiet_transformers():
        directory = locate_checkpoint(model, revision=revision)
        tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        inputs = tokenize(tokenizer, text, model, chat=chat)
        loaded: Any = load(
            model, revision=revision, trust_remote_code=trust_remote_code, progress=progress, **load_options
        )
        runtime = cast("Runtime", loaded.offload)
        tokens = inputs["input_ids"].shape[1]
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling["temperature"] = temperature
        with runtime, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            runtime.record_trace(f"{Path(model).name}, prompt of {tokens} tokens")
            loaded.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, num_beams=1)
            trace = runtime.trace()
    nbytes = write_trace(output, trace)
    found = {"path": str(output), "nbytes": nbytes, "passes": trace.passes, "tokens": len(trace.experts)}
    if as_json:
        write_json(found)
    else:
        click.echo(
            f"{output}: {trace.name}, {len(trace.experts)} tokens in {trace.passes} passes, {format_size(nbytes)}"
        )


@trace_commands.command(
    "show",
    short_help="Show popularity, locality and hit rates.",
    epilog=example("offload trace show text.trace", "offload trace show text.trace --html trace.html"),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a report.")
@json_option
def show_command(file: Path, html: Path | None, as_json: bool) -> None:
    """Show what the trace in FILE says: how unequal experts are, how much tokens repeat, how often caches would hit."""
    with exit_codes(as_json=as_json):
        from offload.errors import InvalidArgumentError
        from offload.trace_summary import summarise
        from offload.traces import read_trace
        from offload.written_files import check_place
        from prefetch.traces.trace import TraceError

        check_place(html)
        trace = read_trace(file)
        try:
            found = summarise(trace)
        except TraceError as error:
            raise InvalidArgumentError(f"{file}: {error}") from error
        if html is not None:
            from offload.trace_html import write_trace_html

            write_trace_html(html, trace, found)
        if as_json:
            click.echo(json.dumps(found.as_dict(), indent=2))
        else:
            _write(found)


def _write(found: TraceSummary) -> None:
    popularity = found.popularity
    known = {
        "layers": f"{found.layers}, {found.experts} experts in all, top {found.top_k}",
        "passes": f"{found.passes}, {found.prefill_passes} of them of a prompt",
        "tokens": f"{found.tokens}, {found.decode_tokens} of them decoded",
        "popularity": f"like rank^-{popularity.skew:.2f}; the busiest tenth of a layer's experts get "
        f"{found.busiest_tenth:.0%} of its tokens, {found.unused} experts get none",
        "locality": f"{popularity.locality:.0%} of a token's experts are the token's before, beyond chance",
    }
    rows = table("slots", "of experts", "LRU", "best possible", "LRU by popularity", numbers=("slots",))
    for point in found.hits:
        cells = (f"{rate:.1%}" for rate in (point.lru, point.belady, point.popularity))
        add_row(rows, str(point.slots), f"{point.share:.0%}", *cells)
    hits = ["", "hit rates of decode", rows] if found.hits else ["", "no hit rates: they need two passes of decode"]
    write(f"{found.name}\n", facts(known), *hits)
