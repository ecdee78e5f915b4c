"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from offload.errors import InvalidArgumentError
from offload.quantisation import make_quantisation, parse_quantisation
from offload.request import PREFILL_CHUNK_TOKENS, parse_sparsity
from offload.sizes import parse_size
from placement.kv import KV_CHOICES

_LEAST_BARE_NBYTES = 1 << 16
"""Numbers below are no sizes that anything could have: whoever writes one means another unit."""

_Command = TypeVar("_Command", bound=Callable[..., Any])


class Sparsity(click.ParamType[str]):
    """A method and a share, as top-k:0.05; stays as it is."""

    name = "sparsity"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The value; a usage error where it is no sparsity."""
        try:
            return str(parse_sparsity(value))
        except InvalidArgumentError as error:
            self.fail(str(error), param, ctx)


class Size(click.ParamType[int]):
    """A size such as 4GiB; becomes bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of `value`; a usage error where it is not a size, or so few bytes that a unit was forgotten."""
        if isinstance(value, str) and value.strip().isdecimal() and 0 < int(value) < _LEAST_BARE_NBYTES:
            self.fail(f"{value!r} has no unit and would be bytes; write a size as 4GiB, 500MB or 65536", param, ctx)
        try:
            return parse_size(value, param.name if param and param.name else self.name)
        except InvalidArgumentError as error:
            self.fail(str(error), param, ctx)


class Quant(click.ParamType[Any]):
    """Packed formats; becomes what `offload.load` takes as `quant`."""

    name = "quant"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The formats of `value`; a usage error where it is none."""
        try:
            quant = parse_quantisation(value) if isinstance(value, str) else value
            make_quantisation(quant)
        except InvalidArgumentError as error:
            self.fail(str(error), param, ctx)
        return quant


class Chunk(click.ParamType[Any]):
    """Tokens of a prompt, or auto; becomes what `offload.load` takes as `prefill_chunk`."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """The number or "auto"; a usage error where it is neither."""
        if value == "auto":
            return "auto"
        if isinstance(value, int):
            return value
        if not value.isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is not a number of tokens from 1 on, nor auto", param, ctx)
        return int(value)


def quant_option(*, required: bool = False) -> Callable[[_Command], _Command]:
    """--quant."""
    return click.option(
        "--quant",
        type=Quant(),
        required=required,
        metavar="FORMAT",
        help="Quantise: int8, int4, mxfp4 or fp8_e4m3, or by part, as experts=int4,dense=int8,lm_head=int8"
        + ("." if required else "; auto for what is predicted to be fastest.  [default: as the checkpoint is]"),
    )


nvme_option = click.option(
    "--nvme",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory of the expert stores, on the fastest disk.  [default: ~/.cache/offload]",
)
prefill_chunk_option = click.option(
    "--prefill-chunk",
    type=Chunk(),
    default=PREFILL_CHUNK_TOKENS,
    show_default=True,
    metavar="N|auto",
    help="Tokens of a prompt that go through the model at once; auto takes what this machine's profile predicts to be "
    "fastest.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Write one JSON object to stdout.")
progress_option = click.option(
    "--progress/--no-progress",
    default=None,
    help="Show progress bars.  [default: where stderr is a terminal]",
)

_MODEL_OPTIONS = (
    click.argument("model"),
    click.option(
        "--ram",
        type=Size(),
        metavar="SIZE",
        help="Most memory for weights, KV cache, activations and experts, as 4GiB (2^30) or 4GB (10^9).  "
        "[default: nine tenths of what is available]",
    ),
    nvme_option,
    click.option(
        "--context",
        type=click.IntRange(min=1),
        metavar="TOKENS",
        help="Longest sequence that room is kept for.  [default: 4096, or the model's own limit if less]",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
        default="auto",
        show_default=True,
        help="In which to compute; auto is the checkpoint's own.",
    ),
    quant_option(),
    click.option(
        "--kv",
        type=click.Choice(KV_CHOICES),
        default="auto",
        show_default=True,
        help="Format of the KV cache; fp8, int8 and int4 round tokens older than 128. auto is the model's dtype.",
    ),
    click.option(
        "--kv-ram",
        type=Size(),
        metavar="SIZE",
        help="Most memory of the KV cache; the rest goes to disk.  [default: as the plan says]",
    ),
    click.option(
        "--kv-sparsity",
        type=Sparsity(),
        metavar="METHOD:SHARE",
        help="Attend to a part of the KV cache, which is lossy: top-k, snapkv or h2o, and the share, as top-k:0.05.",
    ),
    click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub repository."),
    click.option("--trust-remote-code", is_flag=True, help="Allow the checkpoint to bring modeling code."),
)


_ROUTING_OPTIONS = (
    click.option(
        "--skew", type=click.FloatRange(0, 10), help="Popularity of experts: rank^-SKEW.  [default: all alike]"
    ),
    click.option(
        "--trace",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Popularity and hit rates from a trace of this model; see `offload trace record`.",
    ),
)


def routing_options(command: _Command) -> _Command:
    """--skew and --trace: what is known of which experts tokens go to."""
    for option in reversed(_ROUTING_OPTIONS):
        command = option(command)
    return command


def example(*lines: str) -> str:
    """The end of a help text that shows these commands."""
    return "\n".join(("\b", "Example:", *(f"  {line}" for line in lines)))


_DEVICE_OPTIONS = (
    click.option("--device", metavar="NAME", help="A GPU, cuda or cuda:N.  [default: the CPU]"),
    click.option("--vram", type=Size(), metavar="SIZE", help="Most memory of the GPU.  [default: what is free]"),
)


def device_options(command: _Command) -> _Command:
    """The options that name an accelerator."""
    for option in reversed(_DEVICE_OPTIONS):
        command = option(command)
    return command


def model_options(command: _Command) -> _Command:
    """MODEL and the options that decide how it is planned."""
    for option in reversed(_MODEL_OPTIONS):
        command = option(command)
    return command
