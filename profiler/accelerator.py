"""The measurement of an accelerator: memory, kernels by format and tokens, links, locked memory, overheads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from placement.hardware_profile import Compute, HardwareProfile, Link, Overheads
from profiler.accelerator_subjects import AcceleratorSubjects
from profiler.effort import FULL, Effort
from profiler.links import Copies, fit_link
from profiler.points import expert_points, linear_points
from profiler.rounds import PACKED, AttentionPoint, Found
from profiler.subjects import Subjects

_MIB = 1 << 20
_NO_OVERHEADS = Overheads(0.0, 0.0, 0.0)
_LARGE_ROWS, _SMALL_ROWS = 8192, 256
"""Of linear layers; fewer outputs would be computed in the time that a call takes."""
_ATTENTION = (
    AttentionPoint("attention, 64 cached", 1, 64),
    AttentionPoint("attention, 32768 cached", 1, 32768),
    AttentionPoint("attention, 64 new", 64, 0),
    AttentionPoint("attention, 2048 new", 2048, 0),
)
_SIZES = (16 << 10, 256 << 10, 2 * _MIB, 16 * _MIB)
"""Of copies: activations of a token to a large expert."""
_AT_ONCE = 4
_REPEATS = 5
_BESIDE_COPIES = 64
"""Of the largest size, beside the CPU's kernels: long enough for these to read at full speed."""
_BESIDE_FORMAT = "bf16"
_DIRECTIONS = {"to the device": True, "from the device": False}
_MEMORY = {"pinned": True, "pageable": False}


def measure_accelerator(
    subjects: AcceleratorSubjects,
    host: Subjects,
    profile: HardwareProfile,
    *,
    effort: Effort = FULL,
    say: Callable[[str], None] = lambda _what: None,
) -> HardwareProfile:
    """The profile with an accelerator.

    The link to the device is that of copies from pinned memory, out of which experts are copied; the one from the
    device that of copies to pageable memory, into which activations come back. Notes say how fast the others are.

    Args:
        subjects: the runtime on the accelerator.
        host: the runtime on the host, whose kernels run beside copies.
        profile: of the host.
        effort: FULL or QUICK.
        say: told what is being measured.
    """
    formats = [name for name in subjects.formats if effort.formats is None or name in effort.formats]
    experts = {name: expert_points(subjects, name, effort.tokens, experts_of_call) for name in formats}
    linears = {name: linear_points(subjects, name, effort.tokens, _LARGE_ROWS, _SMALL_ROWS) for name in formats}
    found = Found()
    budget_s = effort.call_s / effort.rounds
    for number in range(effort.rounds):
        say(f"{subjects.name}, round {number + 1} of {effort.rounds}")
        for name in formats:
            found.time_products((*experts[name], *linears[name]), budget_s)
        found.time_attention(_ATTENTION, subjects.attention, budget_s)
        found.note("memory", subjects.stream())
        _copy(found, subjects, host)
    bandwidth = found.median("memory")
    gpu = Compute(
        subjects.memory_nbytes,
        bandwidth,
        found.curves(experts),
        found.curves(linears),
        found.attention(_ATTENTION, bandwidth),
        _NO_OVERHEADS,
    )
    links = {(way, memory): _link(found, way, memory) for way in _DIRECTIONS for memory in _MEMORY}
    pinned_nbytes, pinned_note = _pinned(subjects, effort, profile.cpu.memory_nbytes)
    profile = replace(
        profile,
        gpu=gpu,
        to_gpu=links["to the device", "pinned"],
        from_gpu=links["from the device", "pageable"],
        pinned_nbytes=pinned_nbytes,
    )
    say(f"{subjects.name}, forward passes")
    plain = subjects.passes(profile, None)
    packed = subjects.passes(profile, PACKED) if effort.packed_passes and PACKED in formats else None
    notes = (*(f"{subjects.name}: {note}" for note in found.told()), _others(links), pinned_note)
    return replace(
        profile,
        gpu=replace(gpu, overheads=plain, packed_overheads=packed),
        provenance=replace(profile.provenance, notes=(*profile.provenance.notes, *notes)),
    )


def experts_of_call(tokens: int) -> int:
    """Experts of a call: with few tokens many, so that their weights take longer than the call does."""
    return 32 if tokens <= 16 else 8


def _copy(found: Found, subjects: AcceleratorSubjects, host: Subjects) -> None:
    """A round of copies: each way, memory and size alone, and the largest beside the CPU's kernels."""
    for way, up in _DIRECTIONS.items():
        for memory, pinned in _MEMORY.items():
            copy = partial(subjects.copy, up=up, pinned=pinned)
            for nbytes in _SIZES:
                copy(nbytes, _AT_ONCE)
                seconds = [copy(nbytes, _AT_ONCE) / _AT_ONCE for _ in range(_REPEATS)]
                found.add_times(_copies_of(way, memory, nbytes), seconds)
            # Alone right before: only what lies close together can be compared.
            many = partial(copy, _SIZES[-1], _BESIDE_COPIES)
            alone_s = many()
            beside_s, _ = host.beside_kernels(many, _BESIDE_FORMAT, 1, 1)
            found.note(_beside(way, memory), alone_s / beside_s)


def _copies_of(way: str, memory: str, nbytes: int) -> str:
    return f"copies of {nbytes} {way}, {memory}"


def _beside(way: str, memory: str) -> str:
    return f"copies {way} beside kernels, {memory}"


def _link(found: Found, way: str, memory: str) -> Link:
    copies = [Copies(nbytes, found.seconds(_copies_of(way, memory, nbytes))) for nbytes in _SIZES]
    latency_s, bytes_per_s = fit_link(copies)
    return Link(latency_s, bytes_per_s, bytes_per_s * min(1.0, found.median(_beside(way, memory))))


def _others(links: dict[tuple[str, str], Link]) -> str:
    """What the profile has no place for."""
    up, down = (links[one].bytes_per_s / 1e9 for one in (("to the device", "pageable"), ("from the device", "pinned")))
    return f"copies reach {up:.1f} GB/s from pageable memory to the device, {down:.1f} GB/s from it to pinned memory"


def _pinned(subjects: AcceleratorSubjects, effort: Effort, ram_nbytes: int) -> tuple[int, str]:
    """(host memory that may be locked, what a reader must know of it).

    All of it is not tried: what is locked has to be there, and others on the machine have none of it meanwhile.
    """
    half = ram_nbytes // 2
    tried = min(effort.pinned_nbytes, half)
    locked = subjects.lock_memory(tried)
    if locked < tried:
        return locked, f"the system locks {locked / _MIB:.0f} MiB of host memory and refuses more"
    return half, f"{tried / _MIB:.0f} MiB of host memory were locked on trial; half of the RAM is taken as the limit"
