"""Copies from pinned memory to a GPU: torch's in one piece and in pieces, and the runtime's own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu_timing import seconds_of
from benchmarks.harness import Report, Row, Spread
from offload.devices.cuda import CudaDevice
from offload.devices.link import CHUNK_NBYTES
from offload.measuring.device_copies import DeviceCopies

LINK_SHARE = 0.9
_MATRIX = 4096
_PRODUCTS = 8
_BUNDLE_NBYTES = 8 << 20
_BUNDLES = 16
"""Of one turn of the runtime's copies: a layer's experts, each a request of its own."""

WAYS = ((2, CHUNK_NBYTES), (4, CHUNK_NBYTES), (2, 2 * CHUNK_NBYTES), (4, 2 * CHUNK_NBYTES))
"""(threads, bytes of a piece) with which the runtime's copies are timed, beside those that it has."""


def copy_table(report: Report, device: CudaDevice, nbytes: int, rounds: int) -> list[Row]:
    """Rates, and their share of that of one large copy. What the runtime does, and that alone, has the target.

    Args:
        report: takes targets.
        device: with room for slabs; where its driver is one that host memory plays, figures mean nothing.
        nbytes: of one large copy.
        rounds: repeats.
    """
    rows = _of_torch(device.driver.device, nbytes, rounds)
    alone = rows[0]["GB_per_s"]
    assert isinstance(alone, float)
    for threads, chunk_nbytes in dict.fromkeys(((device.copy_threads, CHUNK_NBYTES), *WAYS)):
        copies = DeviceCopies(device, threads=threads, chunk_nbytes=chunk_nbytes)
        is_ours = (threads, chunk_nbytes) == (device.copy_threads, CHUNK_NBYTES)
        for beside in (False, True):
            rate = _runtimes_bytes_per_s(device, copies, rounds, beside=beside) / 1e9
            name = f"the runtime's, {threads} threads, pieces of {chunk_nbytes >> 20} MiB"
            name += ", beside products" if beside else ""
            rows.append({"copy": name, "GB_per_s": rate, "share_of_one_copy": rate / alone, "the_runtimes": is_ours})
            if is_ours:
                report.target(f"{name}: share of the link's rate", rate / alone, "at least", LINK_SHARE)
        copies.close()
    return rows


def _of_torch(device: torch.device, nbytes: int, rounds: int) -> list[Row]:
    """One large copy, the same in pieces on one stream, and the pieces while the GPU multiplies."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def whole(_: int) -> None:
        target.copy_(host, non_blocking=True)

    def pieces(_: int) -> None:
        for at in range(0, nbytes, CHUNK_NBYTES):
            target[at : at + CHUNK_NBYTES].copy_(host[at : at + CHUNK_NBYTES], non_blocking=True)

    ways: dict[str, Callable[[int], None]] = {"one copy": whole, "pieces": pieces}
    if device.type == "cuda":
        stream, products = torch.cuda.Stream(device), _products(device)

        def overlapped(index: int) -> None:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                pieces(index)
            products()
            torch.cuda.current_stream(device).wait_stream(stream)

        ways["pieces beside products"] = overlapped
    rows: list[Row] = []
    alone = 0.0
    for name, call in ways.items():
        rate = nbytes / seconds_of(call, device, rounds).median / 1e9
        alone = alone or rate
        rows.append({"copy": name, "GB_per_s": rate, "share_of_one_copy": rate / alone, "the_runtimes": False})
    return rows


def _products(device: torch.device) -> Callable[[], None]:
    square = torch.randn(_MATRIX, _MATRIX, device=device).to(torch.bfloat16)

    def run() -> None:
        for _ in range(_PRODUCTS):
            torch.matmul(square, square)

    return run


def _runtimes_bytes_per_s(device: CudaDevice, copies: DeviceCopies, rounds: int, *, beside: bool) -> float:
    """Through the `ReadEngine`, from when the first is asked for to when the last is there, after a turn that does not
    count.
    """
    products = _products(device.driver.device) if beside and device.driver.device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(rounds + 1):
        products()
        seconds.append(copies.copy(min(_BUNDLE_NBYTES, copies.most_nbytes), _BUNDLES, up=True, pinned=True))
        device.finish_kernels()
    return _BUNDLES * min(_BUNDLE_NBYTES, copies.most_nbytes) / Spread.of(seconds[1:]).median
