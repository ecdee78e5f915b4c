"""`offload store`: the expert stores on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from offload.cli.errors import exit_codes
from offload.cli.options import example, json_option, nvme_option, progress_option
from offload.cli.output import add_row, table, write, write_json
from offload.errors import InvalidArgumentError, StoreCorruptError
from offload.progress import progress_bar
from offload.request import store_root
from offload.sizes import format_size
from offload.store import ExpertStore, Progress, StoreInfo, list_stores, remove_store
from offload.store import verify as verify_store

_Command = TypeVar("_Command", bound=Callable[..., Any])
_KEY = "Qwen3-30B-A3B-0123456789abcdef-bf16"
_STYLES = {"complete": "", "incomplete": "yellow", "corrupt": "red", "unreadable": "red"}


@click.group(
    "store",
    short_help="List, verify and remove the expert stores on disk.",
    epilog=example("offload store ls", "offload store verify", f"offload store rm {_KEY}"),
)
def store_commands() -> None:
    """Look after the expert stores on disk.

    A store holds the experts of one model in the form in which they are read while it runs. It can be removed at any
    time; the next run writes it again.
    """


@store_commands.command(
    "ls", short_help="List the stores.", epilog=example("offload store ls --nvme /mnt/nvme/offload")
)
@nvme_option
@json_option
def ls(nvme: Path | None, as_json: bool) -> None:
    """List what lies in the store's directory, complete or not."""
    with exit_codes(as_json=as_json):
        root = store_root(nvme)
        stores = list_stores(root)
        total = sum(info.nbytes for info in stores)
        if as_json:
            listed = [{**asdict(info), "path": str(info.path)} for info in stores]
            write_json({"root": str(root), "stores": listed, "total_nbytes": total})
        elif not stores:
            click.echo(f"No stores in {root}.")
        else:
            _write_list(root, stores, total)


def _write_list(root: Path, stores: list[StoreInfo], total: int) -> None:
    listed = table("key", "model", "format", "size", "created", "state", numbers=("size",))
    for info in stores:
        created = datetime.fromtimestamp(info.created_unix).strftime("%Y-%m-%d %H:%M")
        size = format_size(info.nbytes)
        add_row(listed, info.key, info.name, info.format, size, created, info.status, style=_STYLES[info.status])
    details = [f"{info.key}: {info.detail}" for info in stores if info.detail]
    write(listed, "", f"{format_size(total)} in {root}")
    for detail in details:
        click.echo(detail)


@dataclass(frozen=True)
class Verdict:
    """What reading a store gave.

    Attributes:
        key: the store's.
        path: its directory.
        state: incomplete where its conversion did not end, and nothing was read.
        problems: what is wrong, as (bundle or file, message).
    """

    key: str
    path: Path
    state: Literal["ok", "damaged", "incomplete"]
    problems: tuple[tuple[str, str], ...]


@store_commands.command(
    "verify",
    short_help="Read stores against their checksums.",
    epilog=example("offload store verify", f"offload store verify {_KEY} --json"),
)
@click.argument("key", required=False)
@nvme_option
@json_option
@progress_option
def verify(key: str | None, nvme: Path | None, as_json: bool, progress: bool | None) -> None:
    """Read the store KEY, or all stores, and compare every byte with its checksum.

    Exit code 4 where something is damaged; it lists which experts.
    """
    with exit_codes(as_json=as_json):
        root = store_root(nvme)
        stores = list_stores(root) if key is None else [_named(root, key)]
        bar = progress_bar(progress)
        verdicts = [_verify(info, bar) for info in stores]
        damaged = [verdict for verdict in verdicts if verdict.state == "damaged"]
        if as_json:
            write_json({"root": str(root), "ok": not damaged, "stores": [_as_json(verdict) for verdict in verdicts]})
        elif not stores:
            click.echo(f"No stores in {root}.")
        for verdict in () if as_json else verdicts:
            click.echo(f"{verdict.key}: {verdict.state}")
            for where, message in verdict.problems:
                click.echo(f"  {where}: {message}")
        if damaged:
            for verdict in damaged:
                fix = f"remove it with `offload store rm {verdict.key} --nvme {root}`; it is rebuilt at the next run"
                click.echo(f"Error: expert store {verdict.path} is damaged; {fix}", err=True)
            raise click.exceptions.Exit(StoreCorruptError.exit_code)


def _verify(info: StoreInfo, progress: Progress) -> Verdict:
    if info.status == "incomplete":
        return Verdict(info.key, info.path, "incomplete", (("store", info.detail),))
    if info.status != "complete":
        return Verdict(info.key, info.path, "damaged", (("store", info.detail),))
    problems = verify_store(ExpertStore.open(info.path), progress)
    found = tuple((problem.tensor or problem.path.name, problem.message) for problem in problems)
    return Verdict(info.key, info.path, "damaged" if found else "ok", found)


def _as_json(verdict: Verdict) -> dict[str, Any]:
    problems = [{"where": where, "message": message} for where, message in verdict.problems]
    return {"key": verdict.key, "path": str(verdict.path), "state": verdict.state, "problems": problems}


@store_commands.command(
    "rm", short_help="Remove a store and free its space.", epilog=example(f"offload store rm {_KEY} --yes")
)
@click.argument("key")
@nvme_option
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
def rm(key: str, nvme: Path | None, yes: bool, as_json: bool) -> None:
    """Remove the store KEY, whole or not, as `ls` names it."""
    with exit_codes(as_json=as_json):
        root = store_root(nvme)
        info = _named(root, key)
        if not yes:
            _ask(info)
        remove_store(root, key)
        if as_json:
            write_json({"root": str(root), "removed": key, "freed_nbytes": info.nbytes})
        else:
            click.echo(f"Removed {key}: {format_size(info.nbytes)}.")


def _ask(info: StoreInfo) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("There is no terminal to ask on: give --yes to remove it.")
    model = f" of {info.name}" if info.name else ""
    if not click.confirm(f"Remove {info.key}{model}, {format_size(info.nbytes)}?", err=True):
        click.echo("Nothing was removed.", err=True)
        raise click.exceptions.Exit(1)


def _named(root: Path, key: str) -> StoreInfo:
    stores = list_stores(root)
    for info in stores:
        if info.key == key:
            return info
    keys = ", ".join(info.key for info in stores) or "none"
    raise InvalidArgumentError(f"no store {key!r} in {root}; there are: {keys}")
