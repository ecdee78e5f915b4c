"""`offload profile`: measure this machine once, for predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from offload.cli.errors import exit_codes
from offload.cli.options import example, json_option, nvme_option
from offload.cli.output import add_row, facts, table, write
from offload.cli.profile_gpu import gpu_facts, gpu_kernels, speed
from offload.sizes import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from placement.disk import Disk
    from placement.hardware_profile import Compute, HardwareProfile, Overheads


@click.command(
    "profile",
    short_help="Measure this machine, for predictions.",
    epilog=example("offload profile", "offload profile --quick --nvme /fast/disk --json"),
)
@nvme_option
@click.option("--quick", is_flag=True, help="In a few seconds: bf16, int8 and int4 alone, with fewer repeats.")
@click.option("--again", is_flag=True, help="Measure even where a profile of this machine is cached.")
@json_option
def profile_command(nvme: Path | None, quick: bool, again: bool, as_json: bool) -> None:
    """Measure memory, disk, kernels and overheads, and a GPU with its link; `offload plan` then predicts speed.

    The profile is cached and belongs to this machine, its libraries and the disk of the expert stores: when one of them
    changes, it is measured again. Leave the machine alone meanwhile. The first time kernels are compiled, which takes
    a few minutes.
    """
    with exit_codes(as_json=as_json):
        _profile(nvme, quick=quick, again=again, as_json=as_json)


def _profile(nvme: Path | None, *, quick: bool, again: bool, as_json: bool) -> None:
    from offload.cli.libraries import quiet_transformers
    from offload.machine_profile import cached_profile, machine_with, measure_profile, profiles_directory
    from offload.request import store_root
    from profiler.cache import profile_path

    root = store_root(nvme)
    profile = None if again else cached_profile(root)
    path = profile_path(profiles_directory(), machine_with(root))
    if profile is None:
        with quiet_transformers():
            profile, path = measure_profile(root, quick=quick, say=lambda what: click.echo(f"{what} ...", err=True))
    if as_json:
        click.echo(json.dumps(json.loads(profile.to_json()), indent=2))
    else:
        _write(profile, path)


def _write(profile: HardwareProfile, path: Path) -> None:
    origin = profile.provenance
    memory, overheads = profile.cpu.memory_nbytes, profile.cpu.overheads
    known = {
        "machine": origin.machine,
        "measured": f"{origin.date}, with {', '.join(origin.versions)}",
        "kept in": str(path),
        "memory": f"{format_size(memory)} available, read at {speed(profile.cpu.memory_bytes_per_s)}",
        **_disk(profile.disk),
        "a pass": _overheads(overheads),
        **({"a packed pass": _overheads(profile.cpu.packed_overheads)} if profile.cpu.packed_overheads else {}),
        **gpu_facts(profile),
        **({"note": "; ".join(origin.notes)} if origin.notes else {}),
    }
    write(facts(known), "", _kernels(profile.cpu))
    if profile.gpu is not None:
        write("", gpu_kernels(profile.gpu))


def _overheads(known: Overheads) -> str:
    return (
        f"{known.pass_s * 1e3:.2f} ms and {known.layer_s * 1e6:.0f} us a layer beyond products, attention and reads; "
        f"{known.step_s * 1e6:.0f} us more a layer while not all experts are in RAM"
    )


def _disk(disk: Disk | None) -> dict[str, str]:
    if disk is None:
        return {}
    best = max(disk.points, key=lambda point: point.bytes_per_s)
    beside = ", ".join(
        f"{one.reads:.0%} and {one.kernels:.0%} of {one.tokens} token{'s'[: one.tokens > 1]}"
        for one in (disk.few, disk.many)
    )
    first = "" if disk.first_bytes_per_s is None else f"; {speed(disk.first_bytes_per_s)} for the first time"
    return {
        "disk": f"{speed(best.bytes_per_s)} in reads of {format_size(best.block_nbytes)}, {best.in_flight} in flight"
        f"{first}; {disk.latency_s * 1e6:.0f} us for one small read",
        "beside each other": f"reads and kernels are left with {beside}",
    }


def _kernels(cpu: Compute) -> RenderableType:
    made = table("format", "experts, 1 token", "experts, 128 tokens", "linear, 1 token", "linear, 128 tokens")
    for one in cpu.experts:
        both = (one.curve, cpu.linear(one.format))
        cells = [
            f"{2 * tokens / curve.seconds_per_weight(tokens) / 1e9:.1f} GFLOP/s"
            for curve in both
            for tokens in (1, 128)
        ]
        add_row(made, one.format, *cells)
    return made
