"""Kernels alone: linear layers and experts at few and at many tokens, beside torch and the memory's read bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.equality import gate_close, relative_rms
from benchmarks.harness import Report, Spread, interleave, say
from benchmarks.machine import require_memory
from cpu_kernels.expert_mlp import INPUT_DTYPES, expert_mlp
from cpu_kernels.expert_mlp_reference import expert_mlp_reference
from cpu_kernels.isa import isa_of_format
from cpu_kernels.linear import MOST_TOKENS, linear
from cpu_kernels.packed_expert_mlp import packed_expert_mlp
from cpu_kernels.packed_linear import PackedWeights, packed_linear
from cpu_kernels.packed_reference import packed_expert_mlp_reference, packed_linear_reference
from cpu_kernels.panel_mlp import panel_expert_mlp, panel_linear
from cpu_kernels.tape import Choice, Tape
from cpu_kernels.threads import Pool
from cpu_kernels.wide_linear import multiplies_natively, takes_panels
from formats.bundle import BundleLayout
from formats.packed import PACKED_FORMATS, MatrixLayout
from offload.devices.host import HostSlab
from offload.devices.host_threads import kernel_pool

PACKED = ("int8", "int4", "mxfp4")
TORCH_GROUP = 32
TOLERANCE = 2.0**-7
_SHARES = {"bf16": 0.90, "int8": 0.90, "int4": 0.85, "mxfp4": 0.85}
_GFLOPS = 330.0


@dataclass(frozen=True)
class KernelScale:
    """How much is measured.

    Attributes:
        cold_nbytes: weights that calls go through in turn.
        few_tokens: numbers of tokens at which bandwidth counts.
        many_tokens: numbers of tokens at which arithmetic counts.
        shapes: (rows, columns) of linear layers.
        expert: (hidden, intermediate).
        experts: how many a call of the expert kernel has; 0: it is not measured.
        flops: work of one turn at many tokens.
        rounds: repeats.
    """

    cold_nbytes: int
    few_tokens: tuple[int, ...]
    many_tokens: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    expert: tuple[int, int]
    experts: int
    flops: float
    rounds: int


FULL = KernelScale(1100 << 20, (1, 2, 4, 8), (32, 64, 128, 512), ((1536, 2048), (2048, 768)), (2048, 768), 8, 1e10, 3)
QUICK = KernelScale(1 << 20, (1, 2), (8,), ((64, 128),), (128, 64), 2, 1e6, 2)


@dataclass(frozen=True)
class Contender:
    """One kernel with its weights.

    Attributes:
        name: of the kernel.
        nbytes: weights that one call reads.
        copies: sets of weights that calls take in turn.
        run: called with the number of a copy.
        expected: the result for copy 0, fp32 or wider.
        found: the result of the last call.
        play: calls with all copies in turn, from a tape, as decode does it; None where there is no tape.
    """

    name: str
    nbytes: int
    copies: int
    run: Callable[[int], Any]
    expected: Callable[[], torch.Tensor]
    found: Callable[[], torch.Tensor]
    play: Callable[[], object] | None = None


_CALLED = ", called from Python"


def run(scale: KernelScale) -> Report:
    """The benchmark."""
    report = Report("kernels")
    require_memory(9 * scale.cold_nbytes, "weights for seven kernels")
    pool = kernel_pool()
    stream = _repeated(torch.ones(1 << 18), scale.cold_nbytes // 4)
    with torch.no_grad():
        for rows, columns in scale.shapes:
            say(f"linear {rows} x {columns}")
            _measure(
                report, f"Linear, N={rows} K={columns}", partial(_linears, rows, columns, pool, scale), stream, scale, 1
            )
        if scale.experts:
            say("experts")
            hidden, intermediate = scale.expert
            title = f"{scale.experts} experts, hidden {hidden}, intermediate {intermediate}, tokens each"
            _measure(report, title, partial(_experts, pool, scale), stream, scale, scale.experts)
    names = ", ".join(f"{name} {isa_of_format(name)}" for name in ("bf16", *PACKED))
    report.notes.append(f"Instructions: {names}. Threads: {pool.threads}.")
    report.notes.append(
        f"Weights are random; few tokens go through {scale.cold_nbytes / 2**20:.0f} MiB of them in turn, from a tape, "
        "as decode does it; torch's operators, and what is compared with them, are called from Python. The stream is "
        "torch's sum of as many bytes, in the same round. All of it lies in huge pages, as the runtime's slots do. "
        "Bytes are those of weights and scales."
    )
    return report


def _measure(
    report: Report,
    title: str,
    build: Callable[[int], list[Contender]],
    stream: torch.Tensor,
    scale: KernelScale,
    experts: int,
) -> None:
    best: dict[int, dict[str, float]] = {}
    for tokens in (*scale.few_tokens, *scale.many_tokens):
        contenders = build(tokens)
        for contender in contenders:
            contender.run(0)
            gate_close(
                report, f"{title}, {tokens} tokens, {contender.name}",
                contender.found().double().numpy(), contender.expected().double().numpy(), relative_rms, TOLERANCE,
            )  # fmt: skip
        flops = {one.name: _flops(title, scale, tokens, experts) for one in contenders}
        few = _are_few(tokens, scale)
        turns: dict[str, Callable[[], float]] = {"stream": partial(_stream, stream)}
        if few:
            called = [replace(one, name=one.name + _CALLED, play=None) for one in contenders if one.play]
            flops |= {one.name: flops[one.name.removesuffix(_CALLED)] for one in called}
            contenders += called
        for one in contenders:
            calls = one.copies if few else max(1, min(one.copies, int(scale.flops / flops[one.name])))
            turns[one.name] = partial(_seconds, one, calls)
        seconds = interleave(turns, scale.rounds)
        bandwidth = [stream.nbytes / value for value in seconds.pop("stream")]
        for one in contenders:
            speeds = [one.nbytes / value / 1e9 for value in seconds[one.name]]
            shares = [1e9 * speed / most for speed, most in zip(speeds, bandwidth, strict=True)]
            gflops = [flops[one.name] / value / 1e9 for value in seconds[one.name]]
            report.tables.setdefault(title, []).append(
                {
                    "tokens": tokens,
                    "kernel": one.name,
                    "us": Spread.of([1e6 * value for value in seconds[one.name]]),
                    "MB": one.nbytes / 1e6,
                    "GB/s": Spread.of(speeds),
                    "share of stream": Spread.of(shares),
                    "GFLOP/s": Spread.of(gflops),
                }
            )
            best.setdefault(tokens, {})[one.name] = Spread.of(seconds[one.name]).median
            if few and one.name in _SHARES:
                name = f"{title}, {tokens} tokens, {one.name}: share of stream"
                report.target(name, Spread.of(shares).median, "at least", _SHARES[one.name])
            if one.name in PACKED and tokens in (32, 512) and (tokens == 512 or experts > 1):
                name = f"{title}, {tokens} tokens, {one.name}: GFLOP/s"
                report.target(name, Spread.of(gflops).median, "at least", _GFLOPS)
        _against_torch(report, title, tokens, best[tokens])


def _against_torch(report: Report, title: str, tokens: int, seconds: dict[str, float]) -> None:
    """Each packed format beside the fastest of torch's operators that have as many bits or more."""
    if tokens != 1 and tokens < 64:
        return
    for name in PACKED:
        kinds = ("torch bf16", "torch int8") if name == "int8" else ("torch bf16", "torch int8", "torch int4")
        peers = [seconds[kind] for kind in kinds if kind in seconds]
        if peers:
            label = f"{title}, {tokens} tokens, {name} against torch's best: speed"
            ours = seconds.get(name + _CALLED, seconds[name])
            report.target(label, min(peers) / ours, "at least", 1.0)


def _flops(title: str, scale: KernelScale, tokens: int, experts: int) -> float:
    if title.startswith("Linear"):
        rows, columns = (int(word.split("=")[1]) for word in title.split()[1:3])
        return 2.0 * rows * columns * tokens
    hidden, intermediate = scale.expert
    return 6.0 * hidden * intermediate * tokens * experts


def _stream(stream: torch.Tensor) -> float:
    before = perf_counter()
    stream.sum()
    return perf_counter() - before


def _seconds(contender: Contender, calls: int) -> float:
    before = perf_counter()
    if contender.play and calls == contender.copies:
        contender.play()
    else:
        for copy in range(calls):
            contender.run(copy)
    return (perf_counter() - before) / calls


def _repeated(some: torch.Tensor, count: int) -> torch.Tensor:
    """`count` elements, `some` again and again, in memory like that of the runtime's slots: in huge pages."""
    memory = HostSlab(count * some.itemsize).tensor()[: count * some.itemsize].view(some.dtype)
    for start in range(0, count, len(some)):
        memory[start : start + len(some)] = some[: count - start]
    return memory


def _random_bytes(nbytes: int) -> torch.Tensor:
    """Random bytes, fast: a megabyte of them, again and again."""
    some = torch.randint(1, 255, (1 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return _repeated(some, nbytes)


def _valid_scales(count_nbytes: int, format: str) -> torch.Tensor:
    if format == "mxfp4":
        return torch.full((count_nbytes,), 120, dtype=torch.uint8)
    return torch.full((count_nbytes // 2,), 2.0**-7, dtype=torch.bfloat16).view(torch.uint8)


_weights: dict[Any, Any] = {}


def _kept(key: Any, make: Callable[[], Any]) -> Any:
    """Weights of the shape at hand: made once, for all numbers of tokens; those of another shape are let go."""
    shape = key[:2]
    for other in [other for other in _weights if other[:2] != shape]:
        del _weights[other]
    if key not in _weights:
        _weights[key] = make()
    return _weights[key]


def _are_few(tokens: int, scale: KernelScale) -> bool:
    """Whether bandwidth counts."""
    return tokens in scale.few_tokens


def _tape(write: Callable[[Tape], None], pool: Pool) -> Callable[[], object]:
    """What plays a tape; it keeps `write`, and with that what the tape's addresses are of."""
    tape = Tape(torch.bfloat16)
    write(tape)
    return lambda: (tape.play(pool), write)


def _linears(rows: int, columns: int, pool: Pool, scale: KernelScale, tokens: int) -> list[Contender]:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(torch.bfloat16)
    contenders = [_packed_linear(rows, columns, format, pool, scale, x) for format in PACKED]
    few = _are_few(tokens, scale)
    contenders += _bf16_linears(rows, columns, pool, scale, x, few)
    contenders += [_torch_int8(rows, columns, scale, x), _torch_int4(rows, columns, scale, x)]
    return contenders


def _packed_linear(rows: int, columns: int, format: str, pool: Pool, scale: KernelScale, x: torch.Tensor) -> Contender:
    layout = MatrixLayout(rows, columns, format)
    stride = -(-layout.nbytes // 64) * 64
    copies = max(2, scale.cold_nbytes // stride)

    def make() -> tuple[torch.Tensor, list[PackedWeights]]:
        memory = _random_bytes(copies * stride).view(copies, stride)
        memory[:, layout.codes_nbytes : layout.nbytes] = _valid_scales(layout.scales_nbytes, format)
        parts = [(row[: layout.codes_nbytes], row[layout.codes_nbytes : layout.nbytes]) for row in memory]
        return memory, [PackedWeights(codes, scales, layout) for codes, scales in parts]

    _, weights = _kept((rows, columns, format), make)
    out = torch.empty(len(x), rows)

    def expected() -> torch.Tensor:
        return packed_linear_reference(x, weights[0].codes.numpy(), weights[0].scales.numpy(), layout)

    def call(copy: int) -> None:
        packed_linear(x, weights[copy], out, pool=pool)

    def play_all(tape: Tape) -> None:
        for weight in weights:
            tape.packed_linear(x.data_ptr(), weight, None, len(x), rounded.data_ptr())

    rounded = torch.empty(len(x), rows, dtype=x.dtype)
    play = _tape(play_all, pool) if _are_few(len(x), scale) else None
    return Contender(format, layout.nbytes, copies, call, expected, lambda: out, play)


def _bf16_linears(
    rows: int, columns: int, pool: Pool, scale: KernelScale, x: torch.Tensor, few: bool
) -> list[Contender]:
    nbytes = 2 * rows * columns
    copies = max(2, scale.cold_nbytes // nbytes)

    def make() -> torch.Tensor:
        some = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        return _repeated(some, copies * rows * columns).view(copies, rows, columns)

    weights: torch.Tensor = _kept((rows, columns, "bf16"), make)
    results: dict[str, torch.Tensor] = {}

    def expected() -> torch.Tensor:
        return x.double() @ weights[0].double().T

    def ours(copy: int) -> None:
        results["ours"] = (linear if few else panel_linear)(x, weights[copy], None, pool)

    def theirs(copy: int) -> None:
        results["torch"] = F.linear(x, weights[copy])

    found = [Contender("torch bf16", nbytes, copies, theirs, expected, lambda: results["torch"])]
    out = torch.empty(len(x), rows, dtype=x.dtype)

    def play_all(tape: Tape) -> None:
        for weight in weights:
            tape.linear(x.data_ptr(), weight, None, len(x), out.data_ptr())

    if few or not multiplies_natively(torch.bfloat16):
        play = _tape(play_all, pool) if few else None
        found.insert(0, Contender("bf16", nbytes, copies, ours, expected, lambda: results["ours"], play))
    return found


def _torch_int8(rows: int, columns: int, scale: KernelScale, x: torch.Tensor) -> Contender:
    nbytes = rows * columns + 2 * rows
    copies = max(2, scale.cold_nbytes // nbytes)
    weights: torch.Tensor = _kept(
        (rows, columns, "torch int8"),
        lambda: _random_bytes(copies * rows * columns).view(torch.int8).view(copies, rows, columns),
    )
    scales = torch.full((rows,), 2.0**-7, dtype=torch.bfloat16)
    result: list[torch.Tensor] = []

    def call(copy: int) -> None:
        result[:] = [torch._weight_int8pack_mm(x, weights[copy], scales)]

    def expected() -> torch.Tensor:
        return x.double() @ (weights[0].double() * 2.0**-7).T

    return Contender("torch int8", nbytes, copies, call, expected, lambda: result[0])


def _torch_int4(rows: int, columns: int, scale: KernelScale, x: torch.Tensor) -> Contender:
    groups = columns // TORCH_GROUP
    nbytes = rows * columns // 2 + 4 * rows * groups
    copies = max(2, scale.cold_nbytes // nbytes)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32, generator=torch.Generator().manual_seed(0))

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        scale_and_zero = torch.tensor([2.0**-4, 0.0], dtype=torch.bfloat16).repeat(groups * rows)
        scales = _repeated(scale_and_zero, copies * len(scale_and_zero)).view(copies, groups, rows, 2)
        return _repeated(packed.flatten(), copies * packed.numel()).view(copies, *packed.shape), scales

    weights, scales = _kept((rows, columns, "torch int4"), make)
    result: list[torch.Tensor] = []

    def call(copy: int) -> None:
        result[:] = [torch._weight_int4pack_mm_for_cpu(x, weights[copy], TORCH_GROUP, scales[copy])]

    def expected() -> torch.Tensor:
        return x.double() @ ((codes.double() - 8) * 2.0**-4).T

    return Contender("torch int4", nbytes, copies, call, expected, lambda: result[0])


def _experts(pool: Pool, scale: KernelScale, tokens: int) -> list[Contender]:
    return [_expert(format, pool, scale, tokens) for format in ("bf16", *PACKED)]


def _expert(format: str, pool: Pool, scale: KernelScale, tokens: int) -> Contender:
    layout = BundleLayout(*scale.expert, format)
    copies = max(2, scale.cold_nbytes // (layout.nbytes * scale.experts))

    def make() -> Any:
        count = copies * scale.experts
        if format not in PACKED_FORMATS:
            some = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * layout.hidden**-0.5
            memory = _repeated(some.to(torch.bfloat16).view(torch.uint8), count * layout.nbytes)
            return memory.view(count, layout.nbytes).numpy()
        memory = _random_bytes(count * layout.nbytes).view(count, layout.nbytes)
        for name, part in layout.components.items():
            if name.endswith("scale"):
                memory[:, part.offset : part.offset + part.nbytes] = _valid_scales(part.nbytes, format)
        return memory.numpy()

    bundles = _kept((*scale.expert, f"expert {format}"), make)
    addresses = bundles.__array_interface__["data"][0] + layout.nbytes * np.arange(len(bundles))
    pairs = tokens * scale.experts
    x = torch.randn(tokens, layout.hidden, generator=torch.Generator().manual_seed(tokens)).to(torch.bfloat16)
    stored = x.view(torch.uint16).numpy()
    assert stored.dtype == INPUT_DTYPES["bf16"]
    offsets, tokens_of_pairs = tokens * np.arange(scale.experts + 1), np.tile(np.arange(tokens), scale.experts)
    rows = np.arange(pairs)
    out = np.empty((pairs, layout.hidden), np.float32)
    if format in PACKED_FORMATS:
        mlp = packed_expert_mlp
    else:
        panels = tokens > MOST_TOKENS and takes_panels(torch.bfloat16)
        mlp = panel_expert_mlp if panels else expert_mlp

    def call(copy: int) -> None:
        chosen = addresses[copy * scale.experts : (copy + 1) * scale.experts]
        mlp(chosen, layout, offsets, tokens_of_pairs, stored, "silu", out, rows, threads=pool)

    def expected() -> torch.Tensor:
        if format in PACKED_FORMATS:
            return packed_expert_mlp_reference(bundles[0], layout, x, "silu")
        return expert_mlp_reference(bundles[0], layout, x.double(), "silu")

    ids = torch.arange(scale.experts).repeat(tokens, 1)
    shares = torch.full((tokens, scale.experts), 1 / scale.experts)
    choice = Choice(ids, shares.clone(), shares)

    def play_all(tape: Tape) -> None:
        for chosen in addresses.reshape(copies, scale.experts):
            tape.experts(layout, "silu", chosen, choice, x.data_ptr())

    play = _tape(play_all, pool) if _are_few(tokens, scale) else None
    nbytes = layout.nbytes * scale.experts
    return Contender(format, nbytes, copies, call, expected, lambda: torch.from_numpy(out[:tokens]), play)
