"""`offload quantize`: the expert store of a quantised model, ahead of its first run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from offload.cli.errors import exit_codes
from offload.cli.options import example, json_option, nvme_option, progress_option, quant_option
from offload.cli.output import write_json
from offload.progress import progress_bar
from offload.sizes import format_size


@click.command(
    "quantize",
    short_help="Write a quantised expert store ahead of the first run.",
    epilog=example(
        "offload quantize ./Qwen3-30B-A3B --quant int4",
        "offload quantize ./Qwen3-30B-A3B --quant experts=mxfp4 --nvme /mnt/nvme/offload",
    ),
)
@click.argument("model")
@quant_option(required=True)
@nvme_option
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub repository.")
@click.option("--trust-remote-code", is_flag=True, help="Allow the checkpoint to bring modeling code.")
@json_option
@progress_option
def quantize_command(as_json: bool, progress: bool | None, **options: Any) -> None:
    """Pack the experts of MODEL, a directory or a Hub id, into a store that `run` with the same --quant uses.

    Needs memory for a few experts only. Dense weights are packed when the model is loaded, which takes seconds. A
    store that is there already is left as it is.
    """
    with exit_codes(as_json=as_json):
        _quantize(as_json=as_json, progress=progress, **options)


def _quantize(
    *,
    model: str,
    quant: str | dict[str, str | None],
    nvme: Path | None,
    revision: str | None,
    trust_remote_code: bool,
    as_json: bool,
    progress: bool | None,
) -> None:
    from offload.cli.libraries import quiet_transformers
    from offload.errors import InvalidArgumentError
    from offload.preparation import prepare_checkpoint
    from offload.quantisation import make_quantisation
    from offload.request import PREFILL_CHUNK_TOKENS, make_request
    from offload.store.convert import convert

    if make_quantisation(quant).is_open:
        raise InvalidArgumentError(
            "--quant auto: a format is chosen for budgets, which a store does not have. Fix: name one; "
            "`offload plan MODEL --quant auto` with --ram and other budgets says which"
        )
    # Whether the model can run here does not matter for its store.
    request = make_request(
        ram=sys.maxsize, nvme=nvme, context=None, batch=1, prefill_chunk=PREFILL_CHUNK_TOKENS, max_memory=None,
        quant=quant,
    )  # fmt: skip
    with quiet_transformers():
        prepared = prepare_checkpoint(model, request, revision=revision, trust_remote_code=trust_remote_code)
    if not prepared.bundles.groups:
        prepared.checkpoint.close()
        raise InvalidArgumentError(
            f"{model} is a dense model without experts, of which no store is written: its weights are packed when it "
            f"is loaded, as by `offload run {model} --quant ...`"
        )
    try:
        store = convert(prepared.bundles, request.store_root, progress=progress_bar(progress))
    finally:
        prepared.checkpoint.close()
    if as_json:
        write_json({"path": str(store.path), "format": store.format, "nbytes": store.nbytes})
    else:
        click.echo(f"{store.path}: {prepared.plan.expert_count} experts in {store.format}, {format_size(store.nbytes)}")
